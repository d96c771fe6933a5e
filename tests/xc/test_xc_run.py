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


def _killed_and_moved(
    folder: Path, cache: Path, stage: str, kill_at: int, *settings: str
) -> tuple[Run, Run]:
    """A run of one process, and one that is killed and goes on with two; they leave the same."""
    whole = _run(folder, f"{stage}-whole", cache, *settings)
    whole.train(1)
    killed = _run(folder, f"{stage}-killed", cache, *settings)
    killed.start(1)
    killed.wait_for_step(kill_at)
    killed.kill(signal.SIGKILL)
    killed.finish()
    killed.train(2)
    _same(whole, killed)
    assert kinds(killed.checked())["start"] == 2
    return whole, killed


@pytest.mark.long
def test_both_stages_survive_a_kill_and_other_processes(
    tmp_path: Path, compilation_cache: Path
) -> None:
    tiny_dataset(tmp_path)
    settings = ("total_steps=12", "evaluation={every = 12}")
    # The first refresh is in step 7.
    whole, killed = _killed_and_moved(tmp_path, compilation_cache, "encoder", 7, *settings)
    assert kinds(killed.checked())["evaluation"] >= 1
    grouped = checkpoint_arrays(killed.path, 12)["sampler/grouped"]
    assert sorted(grouped.tolist()) == list(range(len(grouped)))
    assert grouped.tolist() != list(range(len(grouped)))
    model = open_xc_model(killed.path)
    assert len(model.label_texts()) == model.num_labels
    encoder = model.read_encoder()
    assert encoder["embed"].shape[1] == model.encoder.width

    # Killed in step 5 or later, with a checkpoint of step 4 behind it.
    second = (
        "total_steps=8",
        "durability.checkpoint_every=4",
        "xc.stage='classifiers'",
        f"xc.encoder_run='{whole.path}'",
    )
    _, killed = _killed_and_moved(tmp_path, compilation_cache, "classifiers", 5, *second)
    trained = open_xc_model(killed.path)
    assert trained.read_classifiers().shape == (model.num_labels, model.encoder.width)
    assert np.array_equal(trained.read_encoder()["embed"], encoder["embed"])
