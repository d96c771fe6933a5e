"""Published capacity ratios, in runs of 300 requests, and the search itself."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jaxserve.cli.simulate import app
from jaxserve.engine.scheduler.auto_budget import auto_token_budget
from jaxserve.engine.scheduler.budget import decode_step
from jaxserve.engine.step_cost import add_chunk
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


def test_auto_tau_keeps_the_objective_in_the_hardest_step() -> None:
    """128 decodes that fill the pages, and a chunk at the end of the longest context."""
    made = experiment("yi-34b-chat")
    config = made.engine("sarathi").scheduler
    taus = range(128, 2049, 64)
    chosen = auto_token_budget(config, made.cost, 0.2, taus, margin=1.0)

    def hardest_s(tau: int) -> float:
        decodes = decode_step(128, config.num_pages * config.page_size, tau)
        return made.cost.predict_s(add_chunk(decodes, config.max_model_len, tau - 128, tau))

    assert hardest_s(chosen) <= 0.2 < hardest_s(chosen + 64)
    # With a margin it is a budget that keeps as much less.
    careful = auto_token_budget(config, made.cost, 0.2, taus, margin=0.5)
    assert hardest_s(careful) <= 0.1 < hardest_s(careful + 64)


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


def test_a_run_that_ends_early_counts_what_had_come_by_then() -> None:
    found = find_scenario("mistral-7b-chat")
    engine = experiment("mistral-7b-chat").engine("sarathi")
    workload = make_workload(
        found.workload, 60, 1, max_model_len=found.max_model_len, arrivals=ArrivalProcess()
    )
    whole = simulate(engine, workload.at(2.0))
    cut = simulate(engine, workload.at(2.0), until_s=15.0)
    assert cut.complete
    assert 15.0 <= cut.end_s < 16.0
    # The same tokens at the same times, up to the step that went past the end.
    expected = {
        timing.request.request_id: [s for s in timing.token_s if s < cut.end_s]
        for timing in whole.timings
    }
    came = {timing.request.request_id: timing.token_s for timing in cut.timings}
    assert came == {name: times for name, times in expected.items() if times}
    assert any(len(t.token_s) < t.request.max_tokens for t in cut.timings)
    # Far too many requests: a queue that had no time to grow is not late.
    relaxed = Objective(tbt_p99_s=1.0)
    assert not probe(engine, workload, relaxed, 20.0).meets
    assert probe(engine, workload, relaxed, 20.0, until_s=1.5).meets
    with pytest.raises(ValueError, match="nothing arrives within"):
        probe(engine, workload, relaxed, 0.001, until_s=1.0)


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
