from __future__ import annotations

import pytest

from jaxserve.engine.load_run import LoadRun, RequestTimes, percentiles, run_load
from jaxserve.engine.metrics import StepRecord
from jaxserve.engine.request import FinishReason
from tests.engine.engine_rig import make_engine, request


def step(step_s: float, gap_s: float, tokens: int = 2, rows: int = 4, wait_s: float = 1.0):
    return StepRecord(0, 0.0, step_s, gap_s, wait_s, tokens, rows)


def test_figures_by_hand() -> None:
    requests = [
        RequestTimes(10.0, [11.0, 12.0, 15.0], 4, FinishReason.LENGTH),
        RequestTimes(10.0, [13.0], 6, FinishReason.STOP),
        RequestTimes(10.0, [], 6, FinishReason.ERROR),
    ]
    steps = [step(1.0, 0.0), step(2.0, 1.0, tokens=4), step(1.0, 0.0, rows=8, wait_s=0.0)]
    figures = LoadRun(requests, steps, 5.0, 0, 3).summary()
    assert figures["num_output_tokens"] == 4
    assert figures["output_tokens_per_s"] == pytest.approx(0.8)
    assert figures["total_tokens_per_s"] == pytest.approx(14 / 5)
    assert figures["num_failed"] == 1
    assert figures["ttft_ms"]["mean"] == pytest.approx(2000.0)
    assert figures["itl_ms"] == percentiles([1000.0, 3000.0]), "first tokens are left out"
    assert figures["tpot_ms"] == percentiles([2000.0])
    assert figures["mean_step_fill"] == pytest.approx(8 / 16)
    assert figures["host_gap_fraction"] == percentiles([0.0, 0.5, 0.0])
    assert figures["steps_by_bucket"] == {"4": 2, "8": 1}
    assert figures["steps_ready_at_once_fraction"] == pytest.approx(1 / 3)


def test_a_run_measures_what_the_engine_did() -> None:
    engine, executor = make_engine(step_s=0.002)
    engine.start()
    requests = [request(f"r{i}", b"abcd", max_tokens=5, ignore_eos=True) for i in range(9)]
    run = run_load(engine, requests, concurrency=3)
    engine.stop()
    figures = run.summary()
    assert (figures["num_requests"], figures["num_failed"]) == (9, 0)
    assert (figures["num_prompt_tokens"], figures["num_output_tokens"]) == (36, 45)
    assert figures["num_steps"] == len(executor.plans)
    assert figures["step_ms"]["p50"] >= 2.0
    assert figures["itl_ms"]["p50"] >= 2.0
    assert figures["elapsed_s"] >= 0.002 * len(executor.plans) * 0.9
    assert max(len(plan.decodes) + len(plan.prefills) for plan in executor.plans) == 3
