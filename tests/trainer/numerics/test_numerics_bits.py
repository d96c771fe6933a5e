"""The same bits on any number of devices, in any sharding, through any resizing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jaxserve.trainer.step_config import OPTIMIZER_OPTIONS

HERE = Path(__file__).parent
FAST = ["devices", "variants", "lora", "resized", "tuned", "corrupted"]
LONG = [
    "shardings",
    "weights",
    "knee",
    "spike",
    "clean",
    *(f"optimizer-{name}" for name in OPTIMIZER_OPTIONS),
]


def results_of(names: list[str], folder: Path, cache: Path) -> dict[str, Any]:
    out = folder / "results.json"
    environment = {
        **os.environ,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE)]),
    }
    program = [sys.executable, str(HERE / "numerics_worker.py"), str(out), str(cache), *names]
    subprocess.run(program, env=environment, check=True, timeout=1400)
    results: dict[str, Any] = json.loads(out.read_text())
    return results


@pytest.fixture(scope="module")
def fast(tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path) -> dict[str, Any]:
    return results_of(FAST, tmp_path_factory.mktemp("fast"), compilation_cache)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path) -> dict[str, Any]:
    return results_of([*LONG, "ordered"], tmp_path_factory.mktemp("long"), compilation_cache)


def check(traces: dict[str, Any]) -> None:
    assert len(traces) > 1
    reference = traces["1 replicated"]
    assert reference["is_finite"]
    assert len(set(map(tuple, reference["bits"]))) == len(reference["bits"])
    differing = [label for label, trace in traces.items() if trace != reference]
    assert not differing


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAST)
def test_bits_are_those_of_one_device(name: str, fast: dict[str, Any]) -> None:
    check(fast[name])


@pytest.mark.long
@pytest.mark.parametrize("name", LONG)
def test_bits_are_those_of_one_device_at_length(name: str, long: dict[str, Any]) -> None:
    check(long[name])


@pytest.mark.long
def test_ordered_mode_stays_close(long: dict[str, Any]) -> None:
    traces = long["ordered"]
    assert len({trace["digest"] for trace in traces.values()}) == 3, "nothing to compare"
    exact = traces["1 replicated"]
    assert exact["losses"][-1] < 0.9 * exact["losses"][0]
    for label in ("2 replicated", "8 zero1"):
        assert traces[label]["ids"] == exact["ids"]
        differences = [
            abs(mine - other)
            for mine, other in zip(traces[label]["losses"], exact["losses"], strict=True)
        ]
        assert len(differences) == 100
        assert max(differences) <= 1e-4
