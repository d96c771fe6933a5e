"""Published capacity ratios, in runs of 300 requests, and the search itself."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jaxserve.cli.simulate import app
from jaxserve.simulator.arrivals import ArrivalProcess
from jaxserve.simulator.capacity import Objective, confidence_interval, find_capacity, probe
from jaxserve.simulator.cost_models.base import HostCost
from jaxserve.simulator.experiment import Experiment, make_cost_model, make_workload
from jaxserve.simulator.metrics import Latencies, percentiles
from jaxserve.simulator.run import SimRun, simulate
from jaxserve.simulator.scenarios import find_scenario


def experiment(scenario: str, token_budget: int = 512) -> Experiment:
    found = find_scenario(scenario)
    return Experiment(
        found.deployment,
        make_cost_model("fitted", found.deployment, HostCost()),
        found.max_model_len,
        token_budget,
    )


def run(policy: str, qps: float, *, scenario: str = "yi-34b-chat", num_requests: int) -> SimRun:
    found = find_scenario(scenario)
    workload = make_workload(
        found.workload,
        num_requests,
        1,
        max_model_len=found.max_model_len,
        arrivals=ArrivalProcess(),
    )
    return simulate(experiment(scenario).engine(policy), workload.at(qps))


@pytest.mark.long
def test_capacity_ratios_of_yi_34b_strict() -> None:
    """Sarathi-Serve's headline: 3.7 times vLLM, 4.0 times Orca."""
    result = CliRunner().invoke(
        app,
        ["capacity", "--scenario", "yi-34b-chat", "--slo", "strict", "--num-requests", "300",
         "--policies", "sarathi,vllm_v0,orca", "--json"],
        catch_exceptions=False,
    )  # fmt: skip
    values = json.loads(result.stdout)
    assert 2.8 <= values["ratio"]["sarathi/vllm_v0"] <= 4.6
    assert 3.0 <= values["ratio"]["sarathi/orca"] <= 5.0
    assert 0.9 <= values["capacity_qps"]["sarathi"] <= 1.8


def test_the_halves_of_stall_free_batching() -> None:
    """Whole prompts beside decodes stall them; chunks without hybrid batches delay prompts."""
    both, hybrid, chunked = (
        Latencies.of(run(policy, 1.0, num_requests=128).timings)
        for policy in ("sarathi", "hybrid_only", "chunked_only")
    )
    p99 = [percentiles(one.tbt_s)["p99"] for one in (both, hybrid, chunked)]
    p50_ttft = [percentiles(one.ttft_s)["p50"] for one in (both, hybrid, chunked)]
    assert p99[1] >= 3 * p99[0]
    assert p99[0] <= p99[2]
    assert p50_ttft[2] >= 1.15 * p50_ttft[0]


def test_capacity_is_a_rate_between_what_holds_and_what_does_not() -> None:
    found = find_scenario("mistral-7b-chat")
    engine = experiment("mistral-7b-chat").engine("sarathi")
    workload = make_workload(
        found.workload, 60, 1, max_model_len=found.max_model_len, arrivals=ArrivalProcess()
    )
    objective = Objective(0.1)
    qps, probes = find_capacity(engine, workload, objective, start_qps=0.5)
    assert {p.qps: p.meets for p in probes}[qps]
    refused = min(p.qps for p in probes if not p.meets)
    assert qps < refused <= qps * 1.0251
    # A run that is given up early says no, as the whole run would.
    early = probe(engine, workload, objective, 4 * qps)
    assert not early.meets
    whole = Latencies.of(simulate(engine, workload.at(4 * qps)).timings)
    assert (
        percentiles(whole.tbt_s)["p99"] > objective.tbt_p99_s
        or percentiles(whole.queue_s)["p50"] > objective.delay_p50_s
    )
    # An objective that no rate meets: a step with a chunk takes longer.
    assert find_capacity(engine, workload, Objective(0.001), start_qps=0.5)[0] == 0.0


def test_every_token_comes_once_and_in_time() -> None:
    done = run("sarathi", 0.8, num_requests=60)
    assert done.complete
    assert len(done.timings) == 60
    for timing in done.timings:
        assert len(timing.token_s) == timing.request.max_tokens
        assert timing.token_s == sorted(timing.token_s)
        assert timing.request.arrival_s <= timing.token_s[0]
        assert timing.queue_s >= 0
    assert done.end_s >= max(timing.token_s[-1] for timing in done.timings)
    assert done.stats.busy_s <= done.end_s


def test_the_same_run_twice_is_the_same_run() -> None:
    first, second = (run("orca", 0.4, num_requests=40) for _ in range(2))
    assert [t.token_s for t in first.timings] == [t.token_s for t in second.timings]


def test_pipeline_stages_take_arrivals_between_completions() -> None:
    """With two stages, a request that arrives while one step is in flight
    enters the first stage at once."""
    done = run("sarathi", 0.2, scenario="falcon-180b-chat", num_requests=30)
    completions = {t for timing in done.timings for t in timing.token_s}
    at_once = [
        timing
        for timing in done.timings
        if timing.queue_s == 0.0 and timing.request.arrival_s not in completions
    ]
    assert at_once


def test_confidence_interval_is_student_s() -> None:
    low, high = confidence_interval([1.0, 2.0, 3.0]) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 4.303 / 3**0.5, 2 + 4.303 / 3**0.5))
    assert confidence_interval([1.0]) is None
