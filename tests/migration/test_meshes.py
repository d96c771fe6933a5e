"""A checkpoint of any mesh loads onto any other, resharded by the tool or not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from rig import ROOT, TINY

SCRIPT = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from checkpoint.migrate.run import Limits, OnProgress
from checkpoint.store import Store, StoreReader
from jaxserve.migration.convert import plan_reshard
from models.checkpoint_model import CHECKPOINTS, write_model_folder
from models.loading import open_model

folder, tiny = Path(sys.argv[1]), Path(sys.argv[2])
source = open_model(tiny)
params = source.load_params(jnp.float32)
state = {"params": params, "opt_state": optax.adam(1e-3).init(params), "rng": jax.random.key(3)}
state["opt_state"] = jax.tree.map(
    lambda leaf: leaf + jnp.arange(leaf.size, dtype=leaf.dtype).reshape(leaf.shape),
    state["opt_state"],
)
host = jax.tree.map(lambda leaf: np.asarray(jax.random.key_data(leaf)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf), state)

# Which axes of an array are spread over which axes of a mesh (a, b); what does not divide
# evenly, such as the vocabulary of 257, stays whole.
LAYOUTS = {
    "replicated": (),
    "first": (("a", "b"),),
    "last": (None, None, ("a", "b")),
    "middle": (None, ("a", "b")),
    "partial first": ("a",),
    "partial last": (None, None, "b"),
    "both": (None, "a", "b"),
    "crossed": (None, "b", "a"),
}

def sharding(leaf, layout, mesh):
    axes = []
    for size, axis in zip(leaf.shape, LAYOUTS[layout]):
        names = () if axis is None else (axis,) if isinstance(axis, str) else axis
        count = int(np.prod([mesh.shape[name] for name in names]))
        axes.append(axis if size % count == 0 else None)
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        axes = []
    return NamedSharding(mesh, P(*axes))

def mesh(count):
    shape = {1: (1, 1), 2: (2, 1), 4: (2, 2), 8: (4, 2)}[count]
    return Mesh(np.array(jax.devices()[:count]).reshape(shape), ("a", "b"))

def check(path, layout, count):
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(
            leaf.shape, leaf.dtype, sharding=sharding(leaf, layout, mesh(count))), state)
    restored = StoreReader(path / CHECKPOINTS).restore(4, abstract)
    spread = 0
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(host), strict=True):
        spread += not leaf.is_fully_replicated
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        assert (np.asarray(leaf) == wanted).all()
    assert (spread > 0) == (layout != "replicated" and count > 1 and not (
        layout == "partial last" and count == 2)), (layout, count, spread)

def reshard(one, other, layers):
    with plan_reshard(one, other, layers=layers, num_workers=2, memory_bytes=None) as conversion:
        conversion.run(Limits(2, None), OnProgress())

num_checked = 0
counts = [1, 2, 4, 8]
for index, layout in enumerate(LAYOUTS):
    run = folder / layout.replace(" ", "-")
    write_model_folder(run, source.config, None)
    placed = jax.tree.map(
        lambda leaf: jax.device_put(leaf, sharding(leaf, layout, mesh(counts[-1 - index % 4]))),
        state)
    with Store(run / CHECKPOINTS) as store:
        store.save(4, placed).wait()
    reshard(run, folder / "single", "unscanned")
    reshard(folder / "single", folder / "back", "scanned")
    names = list(LAYOUTS)
    for step, count in enumerate(counts):
        check(run, names[(index + step + 1) % 8], count)
        check(folder / "back", names[(index + step + 3) % 8], count)
        num_checked += 2
    import shutil
    shutil.rmtree(folder / "single")
    shutil.rmtree(folder / "back")
print("checked", num_checked)
"""


@pytest.mark.long
def test_8_layouts_on_1_2_4_and_8_devices(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), str(TINY / "biases")],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert "checked 64" in done.stdout, done.stdout + done.stderr
