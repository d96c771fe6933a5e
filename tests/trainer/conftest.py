"""Runs of training, toy and real."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.trainer.run_driver import CONFIG, Run
from tests.trainer.tiny_dataset import make_dataset

MakeRun = Callable[..., Run]


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 90 examples: an epoch of 5 steps and 10 examples, at 16 a step."""
    return make_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def make_run(tmp_path: Path, tiny_data: Path, compilation_cache: Path) -> MakeRun:
    """Makes configs of runs in this test's folder."""

    def make(name: str = "run", total_steps: int = 40, is_toy: bool = True, extra: str = "") -> Run:
        path = tmp_path / name
        config = tmp_path / f"{name}.toml"
        config.write_text(
            CONFIG.format(
                run=path, total_steps=total_steps, data=tiny_data, cache=compilation_cache
            )
            + extra
        )
        return Run(path, config, is_toy)

    return make


@pytest.fixture(scope="session")
def toy_reference(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Run:
    """An uninterrupted toy run of 40 steps in one process."""
    folder = tmp_path_factory.mktemp("reference")
    config = folder / "run.toml"
    config.write_text(
        CONFIG.format(run=folder / "run", total_steps=40, data=tiny_data, cache=folder / "cache")
    )
    run = Run(folder / "run", config)
    assert run.train_here() == 0
    return run
