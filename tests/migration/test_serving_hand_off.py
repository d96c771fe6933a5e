"""A training run's checkpoint is served as it is, and says what the trainer says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from rig import ROOT

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.offline import complete_in_order
from jaxserve.engine.request import GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.startup import start_engine
from models.loading import open_model

NUM_PROMPTS, NUM_TOKENS = 32, 8

TRAIN = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp, numpy as np, optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from checkpoint.store import Store
from models.checkpoint_model import CHECKPOINTS, write_model_folder
from models.loading import open_model
from models.ops.attention.dense import dense_attend
from tests.engine.tiny_model import make_tiny_model

folder = Path(sys.argv[1])
source = open_model(make_tiny_model(folder / "start"))
config, family = source.config, source.family
write_model_folder(folder / "run", config, source.load_tokenizer())
mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
def place(path, array):
    axes = [None] * array.ndim
    if array.ndim and array.shape[-1] % 8 == 0:
        axes[-1] = ("a", "b")
    return jax.device_put(array, NamedSharding(mesh, P(*axes)))
params = source.load_params(jnp.float32, place=place)
optimizer = optax.adam(1e-3)
state = jax.jit(optimizer.init)(params)

def logits(params, ids):
    x = family.embed(params, config, ids)
    positions = jnp.arange(ids.shape[0], dtype=jnp.int32)
    x, _ = family.run_layers(params, config, x, positions, (), dense_attend(config))
    return family.logits(params, config, x)

@jax.jit
def step(params, state, ids):
    def loss(params):
        scores = jax.nn.log_softmax(logits(params, ids[:-1]))
        return -jnp.take_along_axis(scores, ids[1:, None], 1).mean()
    gradients = jax.grad(loss)(params)
    updates, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, updates), state

random = np.random.default_rng(0)
for _ in range(5):
    params, state = step(params, state, jnp.asarray(random.integers(0, 256, 24), jnp.int32))
with Store(folder / "run" / CHECKPOINTS) as store:
    store.save(5, {"params": params, "opt_state": state}).wait()

evaluate = jax.jit(lambda params, ids, last: logits(params, ids)[last])
local = jax.device_put(params, jax.devices()[0])
answers = []
for index in range(int(sys.argv[2])):
    ids = list(np.random.default_rng(index).integers(0, 256, 3 + index % 9))
    for _ in range(int(sys.argv[3])):
        row = np.zeros(32, np.int32)
        row[: len(ids)] = ids
        ids.append(int(np.argmax(evaluate(local, row, len(ids) - 1))))
    answers.append(ids[-int(sys.argv[3]):])
np.save(folder / "answers.npy", np.array(answers))
print(len(jax.devices()), "devices")
"""


def test_a_run_on_8_devices_is_served_and_says_what_the_trainer_says(
    tmp_path: Path, compilation_cache: Path
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TRAIN, str(tmp_path), str(NUM_PROMPTS), str(NUM_TOKENS)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
            "JAX_COMPILATION_CACHE_DIR": str(compilation_cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert "8 devices" in done.stdout, done.stderr
    answers = np.load(tmp_path / "answers.npy", allow_pickle=False)
    start = open_model(tmp_path / "start").load_params(jnp.float32)
    trained = open_model(tmp_path / "run").load_params(jnp.float32)
    assert not np.array_equal(start["embed"], trained["embed"])
    engine = start_engine(
        EngineConfig(
            model=str(tmp_path / "run"),
            dtype="float32",
            token_budget=16,
            max_num_seqs=8,
            page_size=4,
            compilation_cache_dir=compilation_cache,
        )
    )
    try:
        sampling = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
        requests = [
            GenerationRequest(
                str(index),
                tuple(int(i) for i in np.random.default_rng(index).integers(0, 256, 3 + index % 9)),
                sampling,
            )
            for index in range(NUM_PROMPTS)
        ]
        made = list(complete_in_order(engine.engine, requests, max_ahead=8))
    finally:
        engine.close()
    for index, completion in enumerate(made):
        assert list(completion.token_ids) == answers[index].tolist(), f"prompt {index}"
