"""`jaxserve train`: what it prints and refuses before anything is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxserve.cli.train import app
from jaxserve.trainer.config import load_config
from jaxserve.trainer.errors import RunError
from tests.trainer.run_driver import CONFIG
from tests.trainer.tiny_dataset import make_dataset

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.toml"
    data = make_dataset(tmp_path / "data")
    path.write_text(CONFIG.format(run=tmp_path / "run", total_steps=40, data=data, cache="cache"))
    return path


def invoke(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, [str(one) for one in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_help_teaches_both_forms() -> None:
    said = invoke("--help")
    assert "jaxserve train CONFIG.toml" in said
    for name in ("status", "resize", "stop", "run"):
        assert name in said


def test_printed_config_is_complete_and_reads_back(config: Path, tmp_path: Path) -> None:
    printed = tmp_path / "printed.toml"
    printed.write_text(invoke(config, "--print-config", "--set", "total_steps=7", "--devices", "2"))
    read = load_config(printed)
    assert (read.total_steps, read.placement.devices_per_process) == (7, 2)
    assert "watchdog_s = 60.0" in printed.read_text()


def test_dry_run_starts_nothing(config: Path, tmp_path: Path) -> None:
    said = invoke(config, "--dry-run", "--processes", "3")
    # V E + 2 layers of (2 E H D + 2 E K D + 3 E F + 2 E) + E parameters.
    attention = 2 * 32 * 32 + 2 * 32 * 16
    assert f"{257 * 32 + 2 * (attention + 3 * 32 * 64 + 2 * 32) + 32:,}" in said
    assert "40 of 256 tokens" in said
    assert "3; logical shards of each: " in said
    assert not (tmp_path / "run").exists()


def test_example_is_small() -> None:
    config = load_config(ROOT / "examples" / "train" / "tiny.toml")
    assert config.total_steps == 40
    assert Path(config.data.path).is_dir()


def test_no_run_no_status(tmp_path: Path) -> None:
    for command in (["status"], ["stop"], ["resize", "--processes", "2"]):
        with pytest.raises(RunError, match="holds no training run"):
            invoke(*command, tmp_path)


def test_status_of_a_run_that_nobody_trains(config: Path, tmp_path: Path) -> None:
    from tests.trainer.run_driver import Run

    run = Run(tmp_path / "run", config)
    assert run.train_here(1, "total_steps=5") == 0
    status = json.loads(invoke("status", run.path, "--json"))
    assert (status["state"], status["next_step"], status["checkpoints"]) == ("finished", 5, [5])
    assert status["goodput"]["wall_s"] > 0
    assert run.train_here(1, "total_steps=5") == 0  # Finds nothing to do, and says so.
    again = json.loads(invoke("status", run.path, "--json"))
    assert again["goodput"] == status["goodput"]
    assert "finished" in invoke("status", run.path)
    with pytest.raises(RunError, match="nobody trains"):
        invoke("stop", run.path)
