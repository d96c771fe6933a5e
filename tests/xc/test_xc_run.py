"""`jaxserve train` with both stages: killed, and gone on with another number of processes."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

from jaxserve.trainer.config_file import dump_toml
from jaxserve.xc.model_folder import open_xc_model
from tests.trainer.independent_reader import (
    checkpoint_arrays,
    committed,
    kinds,
    last_checkpoint,
    results,
)
from tests.trainer.run_driver import Run
from tests.xc.tiny_xc import tiny_dataset
from tests.xc.xc_rig import tiny_config

COMMON = ("batch.num_logical_shards=2", "batch.micro_batch_size=8", "durability.checkpoint_every=8")


def _run(folder: Path, name: str, cache: Path, *settings: str) -> Run:
    path = folder / name
    placed = (f"run_dir={path}", f"compilation_cache_dir={cache}", "logging.plot=false")
    config = folder / f"{name}.toml"
    config.write_text(dump_toml(tiny_config(folder, *COMMON, *placed, *settings)))
    return Run(path, config, is_toy=False)


def _same(one: Run, other: Run) -> None:
    first, second = (committed(run.checked()) for run in (one, other))
    assert results(first) == results(second)
    step = last_checkpoint(one.path)
    arrays, others = (checkpoint_arrays(run.path, step) for run in (one, other))
    assert arrays.keys() == others.keys()
    assert all(np.array_equal(arrays[name], others[name]) for name in arrays)


@pytest.mark.long
def test_a_run_survives_a_kill_and_other_processes(tmp_path: Path, compilation_cache: Path) -> None:
    tiny_dataset(tmp_path)
    settings = ("total_steps=12", "evaluation={every = 12}")
    whole = _run(tmp_path, "whole", compilation_cache, *settings)
    whole.train(1)
    killed = _run(tmp_path, "killed", compilation_cache, *settings)
    killed.start(1)
    killed.wait_for_step(7)  # The first refresh is in step 7.
    killed.kill(signal.SIGKILL)
    killed.finish()
    killed.train(2)
    _same(whole, killed)
    found = kinds(killed.checked())
    assert found["start"] == 2
    assert found["evaluation"] >= 1
    grouped = checkpoint_arrays(killed.path, 12)["sampler/grouped"]
    assert sorted(grouped.tolist()) == list(range(len(grouped)))
    assert grouped.tolist() != list(range(len(grouped)))
    model = open_xc_model(killed.path)
    assert len(model.label_texts()) == model.num_labels
    assert model.read_encoder()["embed"].shape[1] == model.encoder.width
