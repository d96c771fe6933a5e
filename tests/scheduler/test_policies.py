"""What tells the policies apart; `test_scheduler.py` has what they share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from jaxserve.engine.plan import StepPlan
from jaxserve.engine.request import Request, ServiceObjective
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.policies import POLICIES, Policy
from jaxserve.engine.scheduler.policies.orca import OrcaPolicy
from jaxserve.engine.scheduler.policies.slack import SlackPolicy
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.errors import ConfigError
from tests.scheduler.driver import random_run
from tests.scheduler.fake_device import results_of
from tests.scheduler.properties import PROMISES, WHOLE_PROMPT_POLICIES
from tests.scheduler.test_scheduler import commit, make_request, plan_step, timeline
from tests.scheduler.timelines import FIGURES, read_goldens

CONFIG = SchedulerConfig(
    num_pages=64,
    max_model_len=48,
    max_num_seqs=4,
    token_budget=8,
    buckets=(4, 8, 64),
    page_size=4,
    watermark=0.0,
    max_in_flight=1,
    prefix_caching=False,
)
PIPES: dict[str, dict[str, object]] = {
    "chained": {"max_in_flight": 2, "chain_decodes": True},
    "two stages": {"max_in_flight": 2, "chain_decodes": False},
    "four stages, chunks stream": {
        "max_in_flight": 4,
        "chain_decodes": False,
        "stream_chunks": True,
    },
    "micro-batches of two": {
        "max_in_flight": 4,
        "chain_decodes": False,
        "stream_chunks": True,
        "max_num_seqs": 7,
        "max_seqs_per_step": 2,
        "token_budget": 12,
        "buckets": (4, 12, 64),
    },
}


def scheduler_of(policy: str, **changes: object) -> Scheduler:
    return Scheduler(replace(CONFIG, policy=policy, **changes))  # type: ignore[arg-type]


def run_step(scheduler: Scheduler, now_s: float = 0.0) -> StepPlan:
    plan = plan_step(scheduler, now_s)
    commit(scheduler, plan)
    return plan


def run_to_the_end(scheduler: Scheduler) -> list[StepPlan]:
    plans = []
    while scheduler.has_work:
        plans.append(plan_step(scheduler))
        commit(scheduler, plans[-1])
        scheduler.check_integrity()
    return plans


def add_all(scheduler: Scheduler, prompts: dict[str, int], *, max_tokens: int = 3) -> None:
    for index, (name, num_prompt) in enumerate(prompts.items()):
        scheduler.add(
            make_request(name, num_prompt, max_tokens=max_tokens, first_token=1000 * index)
        )


@pytest.mark.parametrize("figure", FIGURES)
def test_golden_timelines(figure: str) -> None:
    assert {policy: FIGURES[figure](policy) for policy in POLICIES} == read_goldens(figure)


@pytest.mark.parametrize("pipe", PIPES)
@pytest.mark.parametrize("policy", POLICIES)
def test_properties_under_random_traffic(policy: str, pipe: str) -> None:
    for seed in range(3):
        random_run(seed, 50, policy=policy, **PIPES[pipe])
        random_run(seed, 30, policy=policy, num_classes=3, **PIPES[pipe])


@pytest.mark.long
@pytest.mark.parametrize("policy", POLICIES)
def test_many_random_steps_of_every_policy(policy: str) -> None:
    """At least 5 * 10^4 steps of all policies together."""
    totals = [
        random_run(seed, 100, policy=policy, num_classes=1 + 2 * (seed % 3 == 0), **pipe)
        for seed in range(1000, 1015)
        for pipe in PIPES.values()
    ]
    assert sum(total.num_steps for total in totals) >= 6_000
    assert sum(total.num_finished for total in totals) > 1000
    if PROMISES[policy].preempts:
        assert sum(total.num_preemptions for total in totals) > 25


@pytest.mark.parametrize("policy", sorted(WHOLE_PROMPT_POLICIES))
def test_a_whole_prompt_is_in_one_step(policy: str) -> None:
    """The baselines are real: nothing cuts a prompt to the token budget."""
    scheduler = scheduler_of(policy)
    add_all(scheduler, {"a": 40, "b": 47 - 3, "c": 11})
    chunks = [chunk for plan in run_to_the_end(scheduler) for chunk in plan.prefills]
    assert sorted((c.request_id, c.start, c.num_tokens) for c in chunks) == [
        ("a", 0, 40),
        ("b", 0, 44),
        ("c", 0, 11),
    ]


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - WHOLE_PROMPT_POLICIES))
def test_the_others_cut_prompts_to_the_token_budget(policy: str) -> None:
    scheduler = scheduler_of(policy)
    add_all(scheduler, {"a": 40, "b": 11})
    plans = run_to_the_end(scheduler)
    assert max(plan.num_tokens for plan in plans) == 8
    assert all(plan.num_rows_bucket <= 8 for plan in plans)


@pytest.mark.parametrize("policy", sorted(WHOLE_PROMPT_POLICIES))
def test_only_scored_prompts_are_cut_since_few_rows_are_scored(policy: str) -> None:
    scheduler = scheduler_of(policy)
    scheduler.add(make_request("s", 10, sampling=SamplingParams(prompt_logprobs=0)))
    first = plan_step(scheduler)
    assert timeline(first) == ([], [("s", 0, 4)])
    commit(scheduler, first)
    assert timeline(plan_step(scheduler)) == ([], [("s", 4, 4)])


@pytest.mark.parametrize("policy", sorted(WHOLE_PROMPT_POLICIES))
def test_whole_prompts_need_a_large_enough_bucket(policy: str) -> None:
    with pytest.raises(ConfigError, match=rf"--policy {policy} .* --buckets is 40"):
        scheduler_of(policy, buckets=(8, 40))
    least = {"orca": 50, "hybrid_only": 50}.get(policy, 47)
    scheduler_of(policy, buckets=(8, least))


def test_orca_takes_larger_steps_if_asked() -> None:
    config = replace(CONFIG, policy="orca", buckets=(8, 64, 200))
    scheduler = Scheduler(config, policy=OrcaPolicy(max_step_rows=200))
    add_all(scheduler, {"a": 40, "b": 40, "c": 40, "d": 40})
    assert plan_step(scheduler).num_tokens == 160
    with pytest.raises(ConfigError, match="up to 201 rows"):
        Scheduler(config, policy=OrcaPolicy(max_step_rows=201))


@pytest.mark.parametrize("policy", ["orca", "fastertransformer", "sarathi_decode_maximal"])
def test_reserving_policies_hold_the_longest_sequence_for_each(policy: str) -> None:
    scheduler = scheduler_of(policy, num_pages=30, token_budget=16, buckets=(16, 64))
    add_all(scheduler, {"a": 3, "b": 3, "c": 3}, max_tokens=30)
    held = [scheduler.pages.num_held for _ in range(4) if commit(scheduler, plan_step(scheduler))]
    assert held[-1] == 24  # Two of twelve pages; the third request would need 36.
    assert scheduler.num_waiting == 1
    run_to_the_end(scheduler)
    assert scheduler.num_preemptions == 0


def test_vllm_v0_stalls_decodes_for_prompts() -> None:
    scheduler = scheduler_of("vllm_v0")
    add_all(scheduler, {"a": 3}, max_tokens=9)
    commit(scheduler, plan_step(scheduler))
    seen = []
    for index in range(3):
        scheduler.add(make_request(f"n{index}", 40, first_token=2000 * index + 500))
        seen.append(timeline(run_step(scheduler)))
    assert seen == [([], [(f"n{index}", 0, 40)]) for index in range(3)]
    assert timeline(plan_step(scheduler))[0] == ["a", "n0", "n1", "n2"]


def test_fastertransformer_starts_a_batch_when_the_last_one_is_done() -> None:
    scheduler = scheduler_of("fastertransformer")
    add_all(scheduler, {"a": 3}, max_tokens=6)
    commit(scheduler, plan_step(scheduler))
    scheduler.add(make_request("late", 3, max_tokens=2, first_token=50))
    plans = run_to_the_end(scheduler)
    assert [timeline(plan)[0] for plan in plans] == [["a"]] * 5 + [[], ["late"]]


def test_vllm_v1_takes_pages_chunk_by_chunk_and_may_preempt_a_half_prefilled_prompt() -> None:
    scheduler = scheduler_of("vllm_v1", num_pages=12)
    scheduler.add(make_request("old", 15, max_tokens=30))
    scheduler.add(make_request("young", 40, max_tokens=5, first_token=100))
    plans = []
    while not scheduler.num_preemptions:
        plans.append(plan_step(scheduler))
        commit(scheduler, plans[-1])
    assert plans[1].slot_loads[0].request_id == "young"
    assert [len(c.new_pages) for c in plans[1].prefills] == [2, 1]
    assert plans[-1].preempted == ("young",)
    assert not plans[-1].slot_loads
    young_chunks = [c for plan in plans for c in plan.prefills if c.request_id == "young"]
    assert not any(chunk.samples for chunk in young_chunks)
    run_to_the_end(scheduler)


def test_vllm_v1_lets_a_long_prefill_ahead_of_a_decode_use_up_the_step() -> None:
    """Not stall-free: that is what Sarathi's order adds."""
    stalled = {}
    for policy in ("vllm_v1", "sarathi"):
        scheduler = scheduler_of(policy, max_num_seqs=2, chain_decodes=False, max_in_flight=2)
        add_all(scheduler, {"long": 30, "short": 2}, max_tokens=4)
        first, second = plan_step(scheduler), plan_step(scheduler)
        commit(scheduler, first)
        commit(scheduler, second)
        assert timeline(second) == ([], [("short", 0, 2)])
        stalled[policy] = timeline(plan_step(scheduler))[0] == []
    assert stalled == {"vllm_v1": True, "sarathi": False}


def test_chunks_stream_through_the_pipe_but_decodes_do_not() -> None:
    pipe = {"max_in_flight": 4, "chain_decodes": False}
    streams = scheduler_of("sarathi", stream_chunks=True, **pipe)
    returns = scheduler_of("sarathi", **pipe)
    for scheduler in (streams, returns):
        add_all(scheduler, {"a": 20})
    assert [timeline(plan_step(streams))[1] for _ in range(3)] == [
        [("a", 0, 8)],
        [("a", 8, 8)],
        [("a", 16, 4)],
    ]
    assert streams.plan(0.0) is None
    assert timeline(plan_step(returns))[1] == [("a", 0, 8)]
    assert returns.plan(0.0) is None


def test_micro_batches_share_the_sequences() -> None:
    scheduler = scheduler_of(
        "sarathi", max_in_flight=2, chain_decodes=False, max_seqs_per_step=2, max_num_seqs=4
    )
    add_all(scheduler, {"a": 2, "b": 2, "c": 2, "d": 2}, max_tokens=3)
    steps = []
    in_flight: list[StepPlan] = []
    while scheduler.has_work:
        plan = scheduler.plan(0.0)
        if plan is None:
            commit(scheduler, in_flight.pop(0))
        else:
            in_flight.append(plan)
            steps.append([chunk.request_id for chunk in plan.chunks])
    assert steps == [["a", "b"], ["c", "d"]] * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"chain_decodes": True, "max_in_flight": 4}, "chain_decodes"),
        ({"chain_decodes": False, "max_in_flight": 1}, "--max-num-seqs 4"),
    ],
)
def test_micro_batches_that_starve_somebody_are_refused(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        scheduler_of("sarathi", max_seqs_per_step=2, **changes)


def prioritised(
    name: str, num_prompt: int, priority: int, first_token: int, max_tokens: int = 4
) -> Request:
    request = make_request(name, num_prompt, max_tokens=max_tokens, first_token=first_token)
    request.generation = replace(request.generation, priority=priority)
    return request


def test_lower_classes_are_admitted_first_and_preempted_last() -> None:
    scheduler = scheduler_of(
        "sarathi", num_pages=13, max_num_seqs=3, token_budget=16, buckets=(16,)
    )
    for index, (name, priority) in enumerate({"x": 2, "y": 0, "z": 1}.items()):
        scheduler.add(prioritised(name, 5, priority, 100 * index, max_tokens=30))
    first = plan_step(scheduler)
    assert [chunk.request_id for chunk in first.prefills] == ["y", "z", "x"]
    commit(scheduler, first)
    victims: list[str] = []
    while scheduler.has_work:
        plan = plan_step(scheduler)
        victims += plan.preempted
        commit(scheduler, plan)
    assert victims[0] == "x"
    assert set(victims) == {"x", "z"}
    assert "y" not in victims


def test_unfinished_prefills_go_on_by_class() -> None:
    scheduler = scheduler_of("sarathi", token_budget=8, max_in_flight=3, chain_decodes=False)
    scheduler.add(prioritised("low", 12, 1, 0))
    first = plan_step(scheduler)
    scheduler.add(prioritised("high", 12, 0, 100))
    second = plan_step(scheduler)
    assert timeline(second)[1] == [("high", 0, 8)]
    commit(scheduler, first)
    commit(scheduler, second)
    assert timeline(plan_step(scheduler))[1] == [("high", 8, 4), ("low", 8, 4)]


def slack_scheduler(**options: float) -> Scheduler:
    objective = ServiceObjective(ttft_s=10.0, tbt_s=1.0)
    return Scheduler(replace(CONFIG, policy="slack"), policy=SlackPolicy(objective, **options))


def due(
    name: str, num_prompt: int, ttft_s: float, arrival_s: float = 0.0, first_token: int = 0
) -> Request:
    request = make_request(name, num_prompt, first_token=first_token)
    objective = ServiceObjective(ttft_s, 1.0)
    request.generation = replace(request.generation, objective=objective)
    request.arrival_s = arrival_s
    return request


def order_of_first_chunks(scheduler: Scheduler) -> Sequence[str]:
    plans = run_to_the_end(scheduler)
    return [chunk.request_id for plan in plans for chunk in plan.prefills if not chunk.start]


def test_slack_order_is_by_deadline_and_remaining_prefill() -> None:
    scheduler = slack_scheduler(seconds_per_token=0.1)
    for index, request in enumerate(
        [due("long", 30, 9.0), due("soon", 8, 5.0), due("late", 8, 40.0), due("short", 2, 9.5)]
    ):
        request.generation = replace(
            request.generation,
            prompt_token_ids=tuple(t + 100 * index for t in request.generation.prompt_token_ids),
        )
        scheduler.add(request)
    assert order_of_first_chunks(scheduler) == ["soon", "short", "long", "late"]


def test_an_urgent_arrival_overtakes_an_unfinished_prefill() -> None:
    scheduler = slack_scheduler()
    scheduler.add(due("relaxed", 20, 60.0))
    commit(scheduler, plan_step(scheduler))
    scheduler.add(due("urgent", 6, 1.0, first_token=100))
    assert timeline(plan_step(scheduler))[1] == [("urgent", 0, 6), ("relaxed", 8, 2)]


def test_a_request_that_cannot_make_its_deadline_is_put_behind_once() -> None:
    scheduler = slack_scheduler(tokens_per_s=10.0)
    hopeless, feasible = due("hopeless", 8, 1.0), due("feasible", 8, 5.0, first_token=100)
    scheduler.add(hopeless)
    scheduler.add(feasible)
    assert timeline(run_step(scheduler, now_s=0.5))[1] == [("feasible", 0, 8)]
    assert (hopeless.is_relegated, feasible.is_relegated) == (True, False)
    plan = plan_step(scheduler, now_s=2.0)
    assert timeline(plan) == (["feasible"], [("hopeless", 0, 7)])


def test_relegation_follows_the_measured_throughput() -> None:
    scheduler = slack_scheduler(tokens_per_s=1e9, decay=0.0)
    add_all(scheduler, {"a": 8}, max_tokens=1)
    plan = plan_step(scheduler, now_s=0.0)
    # A token a second.
    scheduler.commit(plan, results_of(plan.step_id, [7], [0.0]), now_s=8.0)
    doomed = due("doomed", 8, 7.0, arrival_s=8.0, first_token=100)
    scheduler.add(doomed)
    plan_step(scheduler, now_s=8.0)
    assert doomed.is_relegated


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_policies_know_their_name(policy: type[Policy]) -> None:
    assert POLICIES[policy.name] is policy
    assert set(PROMISES) == set(POLICIES)
