"""S11: planning and committing is cheap beside any real step."""

from __future__ import annotations

import statistics
import sys
from types import FrameType

import pytest

from tools.bench_scheduler import measure_bare_steps, measure_decode_steps

NOMINAL_BARE_US = 0.1
"""Time of a bare step for each sequence, on the core for which S11's
milliseconds are meant. Slower cores, and busy ones, get their share more."""


@pytest.mark.parametrize(("num_seqs", "limit_ms"), [(64, 0.2), (256, 1.0)])
def test_plan_and_commit_of_decode_steps(num_seqs: int, limit_ms: float) -> None:
    # CPU time, turn by turn with bare steps for about as long, and the median of
    # the turns: other work on the machine slows both down.
    ratios = []
    for _ in range(30):
        bare_s = statistics.fmean(measure_bare_steps(num_seqs, num_steps=400))
        steps = measure_decode_steps(num_seqs, num_steps=20)
        step_s = statistics.fmean(commit_s + read_s for commit_s, read_s in steps)
        if step_s * 1e3 <= limit_ms:
            return
        ratios.append(step_s / bare_s)
    nominal_bare_ms = NOMINAL_BARE_US * num_seqs * 1e-3
    assert statistics.median(ratios) <= limit_ms / nominal_bare_ms


def test_a_decode_makes_about_one_call_a_step() -> None:
    num_seqs, num_steps = 256, 32
    num_calls = num_engine_calls(num_seqs, 2 + num_steps) - num_engine_calls(num_seqs, 2)
    assert num_calls / (num_seqs * num_steps) < 2.0


def num_engine_calls(num_seqs: int, num_steps: int) -> int:
    """Calls of functions of the engine; the same every time."""
    num_calls = 0

    def count(frame: FrameType, event: str, _: object) -> None:
        nonlocal num_calls
        num_calls += event == "call" and "/engine/scheduler/" in frame.f_code.co_filename

    sys.setprofile(count)
    try:
        measure_decode_steps(num_seqs, num_steps)
    finally:
        sys.setprofile(None)
    return num_calls
