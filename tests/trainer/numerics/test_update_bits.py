"""An update's bits do not depend on how many blocks a device holds."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from numerics_rig import CONFIG, MODEL

from jaxserve.trainer.decision import Decision
from jaxserve.trainer.flat_vector import FlatVector
from jaxserve.trainer.optimizer import Moments, UpdateSpec, apply_update, descent_of
from jaxserve.trainer.shard_gradient import abstract_trainable, flat_vector_of
from jaxserve.trainer.step_config import OptimizerConfig, OptimizerName

HERE = Path(__file__).parent
NAMES: tuple[OptimizerName, ...] = (
    "adamw",
    "nadamw",
    "lion",
    "adagrad",
    "radam",
    "adabelief",
    "amsgrad",
    "sgd",
)
NUM_BLOCKS = 6
NUM_DRAWS = 6
"""Of 24,576 elements each; a product rounded in one program only shows in some 2 of them."""
DECISION = Decision(
    loss=jnp.float32(5.5),
    grad_norm=jnp.float32(1.6),
    scale=jnp.float32(0.64),
    lr=jnp.float32(0.0015),
    applied=jnp.bool_(True),
    is_finite=jnp.bool_(True),
)


def flat_vector() -> FlatVector:
    flat = flat_vector_of(abstract_trainable(MODEL, None), "matrices")
    return dataclasses.replace(flat, block_size=4096)


def drawn_vectors(seed: int, num: int) -> list[npt.NDArray[np.float32]]:
    """The gradient, the parameters and what an optimizer keeps, of sizes as in training."""
    rng = np.random.default_rng(seed)
    drawn = [rng.normal(0, scale, (NUM_BLOCKS, 4096)) for scale in (3e-3, 0.02, *[1e-4] * num)]
    kept = [vector**2 for vector in drawn[2:]]  # Some are roots' arguments.
    return [vector.astype(np.float32) for vector in (*drawn[:2], *kept)]


def updated(spec: UpdateSpec, seed: int, first: int, num_blocks: int) -> list[Any]:
    shape = (num_blocks, spec.flat.block_size)
    empty = descent_of(spec.optimizer).init(jnp.zeros(shape, jnp.float32))
    leaves, structure = jax.tree.flatten(empty)
    gradient, master, *kept = (
        jnp.asarray(vector[first : first + num_blocks]) for vector in drawn_vectors(seed, 4)
    )
    state = [kept.pop() if leaf.shape == shape else jnp.asarray(1, leaf.dtype) for leaf in leaves]
    ema = master * 0.99 if spec.optimizer.ema_decay else None
    moments = Moments(master, jax.tree.unflatten(structure, state), ema)
    result, _ = apply_update(spec, moments, gradient, DECISION, np.int32(first))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result) if leaf.ndim == 2]


def differing_elements(optimizer: OptimizerConfig) -> int:
    """Between an update of all blocks and one in parts of 1, 2 and 3 blocks."""
    spec = UpdateSpec(optimizer, flat_vector(), "float32")
    wrong = 0
    for seed in range(NUM_DRAWS):
        whole = updated(spec, seed, 0, NUM_BLOCKS)
        for num_blocks in (1, 2, 3):
            for first in range(0, NUM_BLOCKS, num_blocks):
                part = updated(spec, seed, first, num_blocks)
                for expected, got in zip(whole, part, strict=True):
                    wrong += int(np.count_nonzero(expected[first : first + num_blocks] != got))
    return wrong


def all_differing_elements() -> dict[str, int]:
    """By optimizer; of adamw also with an average of the parameters."""
    result: dict[str, int] = {}
    for name, ema_decay in [*((name, None) for name in NAMES), ("adamw", 0.99)]:
        optimizer = dataclasses.replace(
            CONFIG.optimizer,
            name=name,
            momentum=0.9 if name == "sgd" else None,
            ema_decay=ema_decay,
        )
        assert optimizer.weight_decay
        result[f"{name} {ema_decay}"] = differing_elements(optimizer)
    return result


def test_bits_of_an_update_in_parts() -> None:
    # As many devices as a trainer of that many has: what XLA makes of an update depends on them.
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE)]),
    }
    child = subprocess.run(
        [sys.executable, __file__], env=environment, check=True, capture_output=True, text=True
    )
    differing: dict[str, int] = json.loads(child.stdout)
    assert len(differing) == len(NAMES) + 1
    assert not any(differing.values()), differing


if __name__ == "__main__":
    print(json.dumps(all_differing_elements()))
