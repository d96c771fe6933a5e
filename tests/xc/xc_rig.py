"""Runners of tiny runs, and what they leave behind."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from checkpoint.store import Store
from jaxserve.trainer.config import TrainConfig, config_from_table
from jaxserve.trainer.config_file import with_settings
from jaxserve.trainer.run_folder import RunFolder
from jaxserve.trainer.run_identity import make_world
from jaxserve.trainer.run_model import write_run_model
from jaxserve.trainer.xc_runner import XcRunner, make_xc_runner

TABLE: dict[str, Any] = {
    "run_dir": "run",
    "total_steps": 24,
    "task": "extreme_classification",
    "xc": {
        "encoder": {"width": 12, "hidden": 8},
        "sampler": {"cluster_size": 4, "warmup_epochs": 1, "refresh_every": 1},
        "loss": {"num_hard": 4},
    },
    "batch": {"global_batch_size": 16, "num_logical_shards": 8, "micro_batch_size": 1},
    "schedule": {"kind": "cosine", "peak_value": 0.02},
    "logging": {"params_digest_every": 1},
}


def tiny_config(folder: Path, *settings: str) -> TrainConfig:
    """A config of a run in `folder`, on the data set `folder`/xc."""
    table = with_settings(TABLE, [f"data.path={folder / 'xc'}", *settings])
    return config_from_table(table, folder / "run.toml")


def tiny_runner(config: TrainConfig, num_devices: int = 1) -> XcRunner:
    """A runner on the first devices."""
    return make_xc_runner(config, make_world(config), jax.devices()[:num_devices])[0]


def state_of(runner: XcRunner) -> np.ndarray:
    """Its whole state."""
    buffer = np.zeros(runner.layout.size_bytes, np.uint8)
    runner.store_state(buffer)
    return buffer


def stored_run(path: Path, config: TrainConfig, runner: XcRunner) -> Path:
    """The runner's state as a run of `jaxserve train` keeps it, in the folder `path`."""
    run = RunFolder(path)
    run.make()
    write_run_model(config, run)
    with Store(run.checkpoints) as store:
        store.save(10, runner.layout.tree(state_of(runner))).wait()
    return path


def trace(config: TrainConfig, plan: list[tuple[int, int]]) -> dict[str, Any]:
    """Steps computed by one number of devices after another, `plan` = (devices, steps) each: every
    change is a kill, since nothing but the state goes on. What must be equal for all plans."""
    buffer, steps, step = None, [], 0
    for num_devices, num_steps in plan:
        runner = tiny_runner(config, num_devices)
        assert runner.load_state(buffer) == step
        for _ in range(num_steps):
            record = runner.run_step(step)
            bits = [one.tobytes().hex() for one in (record.loss, record.grad_norm, record.lr)]
            steps.append([record.ids_sha256, record.params_digest, *bits])
            step += 1
        buffer = state_of(runner)
    assert buffer is not None
    return {"steps": steps, "state": hashlib.sha256(buffer.tobytes()).hexdigest()}
