"""Budgets that follow time: what a chunk may cost, and whose deadline decides."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest

from jaxserve.engine.request import Request, ServiceObjective
from jaxserve.engine.scheduler.budget import (
    SlackBudget,
    StepBudget,
    TimeBudget,
    choose_token_budget,
)
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.deadlines import next_token_deadline_s
from jaxserve.engine.scheduler.policies import POLICIES
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.engine.step_cost import FittedStepCost, add_chunk, fit_step_cost
from jaxserve.engine.step_features import StepFeatures
from jaxserve.errors import ConfigError
from tests.scheduler.driver import Run, Traffic
from tests.scheduler.test_scheduler import commit, make_request, plan_step, timeline

CONFIG = SchedulerConfig(
    num_pages=400,
    max_model_len=256,
    max_num_seqs=8,
    token_budget=64,
    buckets=(8, 32, 64),
    page_size=4,
    watermark=0.0,
    max_in_flight=1,
    prefix_caching=False,
)
PER_ROW = FittedStepCost(base_s=0.01, row_s=0.001, decode_context_s=0.0, pair_s=0.0)
"""18, 42 and 74 ms for the three buckets."""
WITH_CONTEXT = replace(PER_ROW, decode_context_s=1e-4, pair_s=1e-5)


def scheduler_with(budget: StepBudget, **changes: object) -> Scheduler:
    return Scheduler(replace(CONFIG, **changes), budget=budget)  # type: ignore[arg-type]


def chunk_sizes(scheduler: Scheduler, name: str) -> list[int]:
    """Of the request's prefill, step by step."""
    sizes = []
    while scheduler.has_work:
        plan = plan_step(scheduler)
        commit(scheduler, plan)
        sizes += [chunk.num_tokens for chunk in plan.prefills if chunk.request_id == name]
    return sizes


def test_a_time_budget_fills_the_largest_bucket_that_keeps_the_target() -> None:
    scheduler = scheduler_with(TimeBudget(PER_ROW, 0.045, max_rows=64))
    scheduler.add(make_request("a", 70, max_tokens=1))
    assert chunk_sizes(scheduler, "a") == [32, 32, 6]


def test_chunks_shrink_as_the_context_in_front_of_them_grows() -> None:
    cost = replace(PER_ROW, row_s=0.0, pair_s=1e-5)
    scheduler = scheduler_with(TimeBudget(cost, 0.03, max_rows=64, min_chunk=4))
    scheduler.add(make_request("a", 240, max_tokens=1))
    sizes = chunk_sizes(scheduler, "a")
    assert sizes[:2] == [63, 26]  # 10 ms + 20 ms of pairs: 63^2 / 2, then 26 * (63 + 13).
    assert all(earlier >= later for earlier, later in pairwise(sizes))
    assert 4 < sizes[-2] < 12


def test_the_first_chunk_is_never_below_the_minimum() -> None:
    scheduler = scheduler_with(TimeBudget(PER_ROW, 0.001, max_rows=64, min_chunk=5))
    scheduler.add(make_request("a", 12, max_tokens=1))
    scheduler.add(make_request("b", 4, max_tokens=1, first_token=100))
    steps = [plan_step(scheduler)]
    while commit(scheduler, steps[-1]) is not None and scheduler.has_work:
        steps.append(plan_step(scheduler))
    assert [timeline(step)[1] for step in steps] == [
        [("a", 0, 5)],
        [("a", 5, 5)],
        [("a", 10, 2)],
        [("b", 0, 4)],
    ]


def test_what_a_prompt_leaves_of_the_time_goes_to_the_next() -> None:
    scheduler = scheduler_with(TimeBudget(PER_ROW, 0.045, max_rows=64))
    for index, name in enumerate("abc"):
        scheduler.add(make_request(name, 12, max_tokens=1, first_token=100 * index))
    assert timeline(plan_step(scheduler))[1] == [("a", 0, 12), ("b", 0, 12), ("c", 0, 8)]


@pytest.mark.parametrize("policy", ["sarathi", "sarathi_decode_maximal", "chunked_only", "slack"])
def test_predicted_time_is_within_the_target_under_random_traffic(policy: str) -> None:
    """S2: within the target, or decode-only, or the minimum chunk."""
    target_s, min_chunk = 0.025, 3
    config = replace(
        CONFIG, num_pages=90, policy=policy, buckets=(8, 16, 64), max_in_flight=2, max_model_len=96
    )
    num_hybrid = num_minimal = 0
    for seed in range(4):
        budget = TimeBudget(WITH_CONTEXT, target_s, max_rows=64, min_chunk=min_chunk)
        run = Run(config, seed, Traffic(max_prompt=60, prompt_logprobs_share=0.0), budget)
        planned = run.monitor.planned

        def check(plan, planned=planned) -> None:  # type: ignore[no-untyped-def]
            nonlocal num_hybrid, num_minimal
            planned(plan)
            if plan is None or not plan.prefills:
                return
            num_tokens = sum(chunk.num_tokens for chunk in plan.prefills)
            if WITH_CONTEXT.predict_s(StepFeatures.of(plan)) <= target_s:
                num_hybrid += 1
            else:
                assert num_tokens <= min_chunk
                num_minimal += 1

        run.monitor.planned = check  # type: ignore[method-assign]
        run.steps(150)
    assert num_hybrid > 50
    # Turns of prefills alone always have room for more than the minimum.
    assert num_minimal > 5 or policy == "chunked_only"


def objective_request(
    name: str, num_prompt: int, objective: ServiceObjective | None, first_token: int = 0
) -> Request:
    request = make_request(name, num_prompt, max_tokens=40, first_token=first_token)
    request.generation = replace(request.generation, objective=objective)
    return request


def test_token_deadlines() -> None:
    objective = ServiceObjective(ttft_s=2.0, tbt_s=0.5)
    request = objective_request("a", 3, objective)
    request.arrival_s = 10.0
    request.output_token_ids, request.last_token_s = [1, 2, 3], 10.7
    request.slot, request.num_prefill_tokens = 0, 3
    request.num_computed_tokens = 6
    assert request.num_pending_tokens == 1
    due = {
        strict: next_token_deadline_s(request, objective, 11.0, strict_gaps=strict)
        for strict in (False, True)
    }
    assert due == {False: 10.0 + 2.0 + 3 * 0.5, True: 10.7 + 0.5}
    request.last_token_s = 14.0  # Behind: one TBT after the last one.
    assert next_token_deadline_s(request, objective, 14.1) == 14.5
    request.num_computed_tokens = 7  # The token before is still in flight.
    assert request.num_pending_tokens == 2
    assert next_token_deadline_s(request, objective, 14.3, strict_gaps=True) == 14.8


def slack_budget(**options: object) -> SlackBudget:
    return SlackBudget(
        PER_ROW,
        ServiceObjective(ttft_s=100.0, tbt_s=0.06),
        max_rows=64,
        min_chunk=4,
        safety=1.0,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("tbt_s", "num_tokens"), [(0.08, 63), (0.05, 31), (0.02, 7), (0.01, 4), (None, 31)]
)
def test_the_most_urgent_decode_sets_the_chunk(tbt_s: float | None, num_tokens: int) -> None:
    scheduler = scheduler_with(slack_budget(strict_gaps=True))
    objective = None if tbt_s is None else ServiceObjective(1.0, tbt_s)
    scheduler.add(objective_request("a", 3, objective))
    first = plan_step(scheduler)
    commit(scheduler, first)
    scheduler.add(make_request("new", 200, first_token=100))
    assert timeline(plan_step(scheduler)) == (["a"], [("new", 0, num_tokens)])


def test_time_that_a_request_is_ahead_goes_to_prefills() -> None:
    objective = ServiceObjective(ttft_s=0.5, tbt_s=0.02)
    sizes = {}
    for strict in (False, True):
        scheduler = scheduler_with(slack_budget(strict_gaps=strict))
        scheduler.add(objective_request("a", 3, objective))
        commit(scheduler, plan_step(scheduler))  # Its first token comes at once.
        scheduler.add(make_request("new", 200, first_token=100))
        sizes[strict] = plan_step(scheduler).prefills[0].num_tokens
    assert sizes == {False: 63, True: 7}


def test_slack_counts_the_steps_in_flight() -> None:
    """Two steps of 18 ms ahead of it leave 23 of 60 ms: one of eight rows."""
    objective = ServiceObjective(ttft_s=0.06, tbt_s=0.001)
    sizes = []
    for max_in_flight in (1, 2, 3):
        scheduler = scheduler_with(slack_budget(), max_in_flight=max_in_flight)
        scheduler.add(objective_request("a", 3, objective))
        commit(scheduler, plan_step(scheduler))
        for _ in range(max_in_flight - 1):
            assert plan_step(scheduler).num_rows_bucket == 8
        scheduler.add(make_request("new", 200, first_token=100))
        sizes.append(plan_step(scheduler).prefills[0].num_tokens)
    assert sizes == [31, 31, 7]


@pytest.mark.parametrize("policy", POLICIES)
def test_only_policies_that_cut_prompts_beside_decodes_take_a_time_budget(policy: str) -> None:
    config = replace(CONFIG, policy=policy, buckets=(8, 64, 300))
    budget = TimeBudget(PER_ROW, 0.1, max_rows=64)
    if policy in ("sarathi", "sarathi_decode_maximal", "chunked_only", "slack"):
        Scheduler(config, budget=budget)
    else:
        with pytest.raises(ConfigError, match=f"--policy {policy}"):
            Scheduler(config, budget=budget)


def test_auto_tau_is_the_largest_budget_within_the_objective() -> None:
    at = {"num_decodes": 8, "decode_context": 800, "chunk_start": 200}
    taus = [8, 16, 32, 64, 128]
    # A step of tau rows: 10 ms + tau + 80 ms of decode context + pairs of the chunk.
    step_s = {
        tau: WITH_CONTEXT.predict_s(
            add_chunk(StepFeatures(8, tau, 8, 8, 800, 0, 0, 0.0), 200, tau - 8, tau)
        )
        for tau in taus
    }
    for tau in taus:
        exactly = choose_token_budget(WITH_CONTEXT, step_s[tau] + 1e-9, taus, **at)
        assert exactly == tau
    with pytest.raises(ConfigError, match="--slo-tbt-ms 97"):
        choose_token_budget(WITH_CONTEXT, 0.097, taus, **at)
    with pytest.raises(ConfigError, match="--slo-tbt-ms"):
        choose_token_budget(PER_ROW, 1.0, [4], **at)  # Holds no eight decodes.


def test_a_fit_gives_back_the_model_that_made_the_samples() -> None:
    model = FittedStepCost(0.02, 0.0005, 2e-7, 3e-8)
    samples = random_samples(model)
    fitted = fit_step_cost(samples)
    for step, seconds in random_samples(model, seed=1):
        assert fitted.predict_s(step) == pytest.approx(seconds, rel=1e-6)
    assert fitted.decode_context_s == pytest.approx(2e-7)
    assert fitted.pair_s == pytest.approx(3e-8)


def test_a_fit_gives_each_bucket_its_own_time() -> None:
    """Bucket times that are on no straight line."""
    model = FittedStepCost(0.0, 0.0, 2e-7, 3e-8, ((8, 0.01), (32, 0.012), (64, 0.05)))
    fitted = fit_step_cost(random_samples(model))
    assert dict(fitted.bucket_s) == pytest.approx(dict(model.bucket_s))
    step = StepFeatures(20, 128, 0, 0, 0, 1, 20, 200.0)
    assert fitted.predict_s(step) > 0.05  # Beyond the measured buckets: the line.


def test_a_fit_never_rewards_work() -> None:
    steps = [step for step, _ in random_samples(PER_ROW)]
    samples = [(step, 0.05 - 1e-7 * step.decode_context) for step in steps]
    fitted = fit_step_cost(samples)
    assert fitted.decode_context_s == 0.0
    assert min(fitted.base_s, fitted.row_s, fitted.pair_s) >= 0.0
    with pytest.raises(ValueError, match="measured"):
        fit_step_cost([])


def random_samples(model: FittedStepCost, seed: int = 0) -> list[tuple[StepFeatures, float]]:
    rng = random.Random(seed)
    samples = []
    for _ in range(40):
        bucket = rng.choice(CONFIG.buckets)
        num_decodes = rng.randrange(1, bucket)
        step = StepFeatures(
            num_decodes, bucket, num_decodes, num_decodes, rng.randrange(20_000), 0, 0, 0.0
        )
        step = add_chunk(step, rng.randrange(2000), bucket - num_decodes, bucket)
        samples.append((step, model.predict_s(step)))
    return samples
