from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.loadgen.schedule import LoadShape, make_schedule, ramped
from jaxserve.simulator.arrivals import ArrivalProcess
from jaxserve.simulator.workloads import Lengths

POISSON = ArrivalProcess()


@pytest.mark.parametrize("workload", ["sharegpt", "azure_conv", "azure_code", "arxiv"])
def test_workloads_are_scaled_to_the_context(workload: str) -> None:
    shape = LoadShape(400, 2.0, POISSON, workload)
    schedule = make_schedule(shape, 512)
    totals = [r.num_prompt_tokens + r.num_output_tokens for r in schedule]
    assert max(totals) <= 512
    assert min(min(r.num_prompt_tokens, r.num_output_tokens) for r in schedule) >= 1
    # Scaled, not cut: the middle of the distribution is scaled like its end.
    whole = make_schedule(shape, 16384 if workload == "arxiv" else 8192)
    factor = 512 / (16384 if workload == "arxiv" else 8192)
    prompts = [np.median([r.num_prompt_tokens for r in s]) for s in (schedule, whole)]
    assert prompts[0] == pytest.approx(prompts[1] * factor, rel=0.05, abs=1)


def test_the_rate_moves_times_and_nothing_else() -> None:
    slow = make_schedule(LoadShape(500, 1.0, POISSON), 1024)
    fast = make_schedule(LoadShape(500, 4.0, POISSON), 1024)
    assert [r[1:3] for r in slow] == [r[1:3] for r in fast]
    assert [r.due_s for r in slow] == pytest.approx([4 * r.due_s for r in fast])
    assert 500 / slow[-1].due_s == pytest.approx(1.0, rel=0.15)
    assert all(r.is_measured for r in slow)


def test_gamma_gaps_have_the_asked_burstiness() -> None:
    due_s = [r.due_s for r in make_schedule(LoadShape(4000, 1.0, ArrivalProcess("gamma", 4.0)), 64)]
    gaps = np.diff(due_s)
    assert gaps.var() / gaps.mean() ** 2 == pytest.approx(4.0, rel=0.2)


def test_a_ramp_rises_linearly_and_is_not_measured() -> None:
    times = ramped(np.arange(0, 1000.0), 10.0, 20.0)
    assert np.all(np.diff(times) > 0)
    # qps * ramp / 2 = 100 requests in the ramp, a quarter of them in its first half.
    assert (times < 20.0 - 1e-9).sum() == 100
    assert (times < 10.0 - 1e-9).sum() == 25
    assert np.diff(times[times > 20]) == pytest.approx(0.1)
    schedule = make_schedule(LoadShape(200, 10.0, POISSON, ramp_s=4.0), 64)
    assert {r.is_measured for r in schedule if r.due_s < 4.0} == {False}
    assert {r.is_measured for r in schedule if r.due_s >= 4.0} == {True}


def test_a_replay_keeps_the_trace(tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text(
        "arrived_at,num_prefill_tokens,num_decode_tokens\n5,100,20\n6,50,10\n9,1000,24\n"
    )
    shape = LoadShape(3, None, ArrivalProcess("replay"), trace=trace)
    schedule = make_schedule(shape, 512)
    assert [r[1:3] for r in schedule] == [(50, 10), (25, 5), (500, 12)]
    assert [r.due_s for r in schedule] == pytest.approx([0.0, 1.0, 4.0])
    faster = make_schedule(LoadShape(3, 7.5, ArrivalProcess("replay"), trace=trace), 512)
    assert [r.due_s for r in faster] == pytest.approx([0.0, 0.1, 0.4])
    with pytest.raises(ConfigError, match="lower --num-requests from 4"):
        make_schedule(LoadShape(4, 1.0, POISSON, trace=trace), 512)


def test_mistakes_are_named() -> None:
    with pytest.raises(ConfigError, match="--qps is missing"):
        LoadShape(1, None, POISSON)
    with pytest.raises(ConfigError, match="--trace"):
        LoadShape(1, 1.0, ArrivalProcess("replay"))
    with pytest.raises(ConfigError, match="--max-model-len is 64"):
        make_schedule(LoadShape(1, 1.0, POISSON, fixed_lengths=Lengths(60, 5)), 64)
