"""A run stopped anywhere, inside a probe too, goes on bit for bit, also on other devices."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import schedules
from schedules.tuner_state import DECAY, tuner_state
from tests.schedules.tuned_run import CONFIG, Along, Run

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("along", ["path", pytest.param("update", marks=pytest.mark.long)])
def test_stopped_at_any_tick(tmp_path: Path, along: Along) -> None:
    run, rates = Run(1, along), {}
    for number, tick in enumerate(run.ticks()):
        run.save(tmp_path / f"{number}.npz")
        rates[tick] = (number, np.asarray(schedules.current_lr(run.opt_state)).tobytes())
    wanted = run.bits()
    assert int(tuner_state(run.opt_state).phase) == DECAY
    stops = [(step, done) for step, done in rates if done]  # inside and right after each probe
    assert {done for _, done in stops} == {1, 2, 3}
    assert len(stops) >= 3 * CONFIG.num_batches
    for stop in [*stops, (1, 0), (20, 0), (40, 0), (59, 0)]:
        run.restore(tmp_path / f"{rates[stop][0]}.npz")
        for tick in run.ticks():
            rate = np.asarray(schedules.current_lr(run.opt_state)).tobytes()
            assert rate == rates[tick][1], (stop, tick)
        assert run.bits() == wanted, stop


@pytest.mark.long
def test_on_other_numbers_of_devices(tmp_path: Path) -> None:
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.schedules.tuned_run", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "same bits\n"
