"""Configs: what is accepted, and that every refusal names the field and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxserve.cli.train import _load
from jaxserve.trainer.config import TrainConfig, load_config
from jaxserve.trainer.config_file import dump_toml
from jaxserve.trainer.errors import TrainConfigError
from schedules import ScheduleConfig, TunerConfig
from tests.trainer.run_driver import CONFIG


@pytest.fixture
def path(tmp_path: Path) -> Path:
    config = tmp_path / "config.toml"
    config.write_text(
        CONFIG.format(run=tmp_path / "run", total_steps=40, data="data", cache=tmp_path / "cache")
    )
    return config


def test_printed_config_reads_back_the_same(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ['data.path="it\'s \\"here\\""', "optimizer.b1=0.8"])
    printed = tmp_path / "printed.toml"
    printed.write_text(dump_toml(config))
    assert load_config(printed) == config
    assert config.optimizer.b1 == 0.8


def test_paths_are_relative_to_the_config(path: Path, tmp_path: Path) -> None:
    assert load_config(path).data.path == str(tmp_path / "data")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("totl_steps=3", r"config.toml: unknown field totl_steps; did you mean total_steps\?"),
        ("optimizer.beta1=0.9", r"unknown field optimizer.beta1; did you mean optimizer.b1\?"),
        ("durability.checkpoint_every=0", "durability.checkpoint_every is 0; it must be at least"),
        ("total_steps=true", "total_steps is True; it must be a whole number"),
        ("total_steps=4.0", "total_steps is 4.0; it must be a whole number"),
        ("data=5", r"data must be a table, \[data\]"),
        ("numerics.mode=fast", "numerics.mode is 'fast'; it must be one of 'exact', 'ordered'"),
        ("numerics.dropout=inf", "numerics.dropout is inf; it must be a finite number"),
        ("optimizer.name=muon", "optimizer.name is 'muon'"),
        ("placement.processes=9", "placement asks for 9 devices, but batch.num_logical_shards"),
        ("schedule.kind=kne", "schedule.kind is 'kne'; it must be one of constant, linear"),
        ("schedule.peak=1", r"unknown field peak; did you mean peak_value\?"),
        ("schedule.decay=3", "decay has no effect with kind 'cosine': leave it out"),
        ("model.source=some", r"\[model\] needs either source"),
        ("batch.global_batch_size.x=1", "batch.global_batch_size.x=1: global_batch_size is a val"),
        ("nonsense", "--set nonsense: write it as FIELD=VALUE"),
    ],
)
def test_refusals_name_the_field(path: Path, setting: str, message: str) -> None:
    with pytest.raises(TrainConfigError, match=message):
        load_config(path, [setting])


def test_missing_field_and_broken_toml(path: Path, tmp_path: Path) -> None:
    path.write_text('run_dir = "x"\n')
    with pytest.raises(TrainConfigError, match="total_steps is missing"):
        load_config(path)
    path.write_text("run_dir = \n")
    with pytest.raises(TrainConfigError, match=r"config.toml is no TOML: .*line 1"):
        load_config(path)
    with pytest.raises(TrainConfigError, match=r"none.toml cannot be read: No such file"):
        load_config(tmp_path / "none.toml")


def schedule_of(config: TrainConfig) -> ScheduleConfig | TunerConfig:
    return config.parsed_schedule


def test_lr_schedule_option_keeps_the_peak(path: Path) -> None:
    knee = schedule_of(_load(path, [], None, None, "knee"))
    assert isinstance(knee, ScheduleConfig)
    assert (knee.kind, knee.peak_value, knee.warmup, knee.total) == ("knee", 0.003, 4, 40)
    tuned = schedule_of(_load(path, [], None, None, "auto"))
    assert isinstance(tuned, TunerConfig)
    assert (tuned.total_steps, tuned.initial_lr) == (40, 0.003 / 64)
    probing = schedule_of(_load(path, ["schedule.probe_every=2"], None, None, "auto"))
    assert isinstance(probing, TunerConfig)
    assert probing.probe_every == 2
    wsd = schedule_of(_load(path, ["schedule.decay=10"], None, None, "wsd"))
    assert isinstance(wsd, ScheduleConfig)
    assert (wsd.kind, wsd.peak_value, wsd.decay) == ("wsd", 0.003, 10)
    with pytest.raises(
        TrainConfigError, match=r"wsd needs decay: give --set schedule.decay=\.\.\."
    ):
        _load(path, [], None, None, "wsd")
    with pytest.raises(TrainConfigError, match="--lr-schedule fast: there is no such schedule"):
        _load(path, [], None, None, "fast")


def test_devices_and_processes_exclude_each_other(path: Path) -> None:
    assert _load(path, [], 4, None, None).placement.devices_per_process == 4
    assert _load(path, [], None, 3, None).placement.processes == 3
    with pytest.raises(TrainConfigError, match="--devices and --processes exclude each other"):
        _load(path, [], 2, 2, None)


def test_placement_and_durability_are_not_frozen(path: Path) -> None:
    frozen = load_config(path).frozen_settings()
    assert {"optimizer.name", "schedule.peak_value", "total_steps", "model.shape.num_layers"} <= (
        frozen.keys()
    )
    assert not [name for name in frozen if name.startswith(("placement", "durability", "logging"))]
