"""Deadlines of two classes, and what a slack budget serves beyond a fixed one."""

from __future__ import annotations

import pytest

from jaxserve.engine.request import GenerationRequest, Request, ServiceObjective
from jaxserve.simulator.arrivals import ArrivalProcess
from jaxserve.simulator.cost_models.base import HostCost
from jaxserve.simulator.deployments import find_deployment
from jaxserve.simulator.experiment import Experiment, make_cost_model, make_workload
from jaxserve.simulator.run import SimRequest, simulate
from jaxserve.simulator.service_classes import (
    QUICK,
    SLOW,
    served_well,
    slack_engine,
    with_classes,
)
from jaxserve.simulator.stability import AffineCostModel, limit_requests_per_s
from jaxserve.simulator.stopwatch import Timing
from jaxserve.simulator.workloads import Lengths
from tools.slack_gain import mistral, most_sustained_qps


def timing(*token_s: float) -> Timing:
    objective = ServiceObjective(ttft_s=2.0, tbt_s=0.5)
    generation = GenerationRequest("r", (0,), objective=objective)
    request = Request(generation, len(token_s), 0, frozenset(), arrival_s=10.0)
    return Timing(request, list(token_s))


def test_a_request_is_served_well_if_no_token_is_late() -> None:
    assert served_well(timing(12.0, 12.5, 13.0))
    # A quick first token is time that later ones may use.
    assert served_well(timing(10.1, 12.4, 12.9))
    assert not served_well(timing(12.1))
    assert not served_well(timing(11.0, 12.6))


def test_classes_are_a_fair_coin_that_follows_the_seed() -> None:
    workload = make_workload("azure_code", 400, 1, max_model_len=8192, arrivals=ArrivalProcess())
    requests = with_classes(workload.at(1.0), 1)
    assert requests == with_classes(workload.at(1.0), 1)
    assert 160 < sum(request.objective == QUICK for request in requests) < 240


def test_under_load_slack_keeps_deadlines_that_a_fixed_budget_misses() -> None:
    deployment = find_deployment("mistral-7b")
    experiment = Experiment(
        deployment,
        make_cost_model("fitted", deployment, HostCost()),
        max_model_len=8192,
        token_budget=256,
        max_num_seqs=128,
    )
    workload = make_workload("azure_code", 400, 1, max_model_len=8192, arrivals=ArrivalProcess())
    requests = with_classes(workload.at(5.2), 1)
    well = {}
    for name, engine in (
        ("fixed", experiment.engine("sarathi")),
        ("slack", slack_engine(experiment, max_rows=2560)),
    ):
        timings = simulate(engine, requests).timings
        quick = [served_well(t) for t in timings if t.request.generation.objective == QUICK]
        slow = [served_well(t) for t in timings if t.request.generation.objective == SLOW]
        well[name] = (sum(quick) / len(quick), sum(slow) / len(slow))
    assert min(well["slack"]) > 0.95
    assert well["fixed"][0] < well["slack"][0] - 0.1
    assert pytest.approx(1.0, abs=0.05) == well["slack"][1]


def test_the_most_that_a_load_without_end_can_be_is_that_of_full_steps() -> None:
    cost = AffineCostModel()
    limit_qps = limit_requests_per_s(cost, 256, 96, 16)
    assert most_sustained_qps(cost, [Lengths(96, 16)] * 5, 256) == pytest.approx(limit_qps)


def test_nothing_sustains_more_than_the_most() -> None:
    """A long burst is served at nearly that rate, and not above it."""
    experiment = mistral()
    lengths = [Lengths(1024, 64)] * 400
    most_qps = most_sustained_qps(experiment.cost, lengths, 512)
    run = simulate(experiment.engine("sarathi"), [SimRequest(one, 0.0) for one in lengths])
    assert 0.85 * most_qps < len(lengths) / run.end_s < most_qps
