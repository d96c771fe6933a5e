"""The same batches and bits on any number of devices, killed anywhere, a refresh included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.xc.tiny_xc import tiny_dataset
from tests.xc.xc_rig import stored_run, tiny_config, tiny_runner

ROOT = Path(__file__).resolve().parents[2]


def _traces(folder: Path, cache: Path, plans: str, *cases: str) -> dict[str, list[Any]]:
    out = folder / "traces.json"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.xc.xc_worker", str(folder), str(out), str(cache), plans]
    subprocess.run([*command, *cases], env=environment, cwd=ROOT, check=True, timeout=800)
    found: dict[str, list[Any]] = json.loads(out.read_text())
    return found


def _check(traces: list[dict[str, Any]]) -> None:
    whole, *others = traces
    assert len({step[1] for step in whole["steps"]}) == 9  # Every step changed the parameters.
    for other in others:
        assert other["steps"] == whole["steps"]
        assert other["state"] == whole["state"]


def test_ngame_is_the_same_on_any_devices_through_kills(
    tmp_path: Path, compilation_cache: Path
) -> None:
    tiny_dataset(tmp_path)
    _check(_traces(tmp_path, compilation_cache, "fast", "ngame")["ngame"])


@pytest.mark.long
def test_classifiers_are_too(tmp_path: Path, compilation_cache: Path) -> None:
    tiny_dataset(tmp_path)
    encoder = tiny_runner(tiny_config(tmp_path))
    encoder.load_state(None)
    stored_run(tmp_path / "encoder", tiny_config(tmp_path), encoder)
    _check(_traces(tmp_path, compilation_cache, "fast", "classifiers")["classifiers"])


@pytest.mark.long
def test_all_samplers_and_shardings_are_too(tmp_path: Path, compilation_cache: Path) -> None:
    tiny_dataset(tmp_path)
    traces = _traces(
        tmp_path, compilation_cache, "long", "ngame", "zero1", "softmax", "bank", "centroid", "ance"
    )
    for case, found in traces.items():
        print(case)
        _check(found)
