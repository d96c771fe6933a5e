"""What the scheduler does in situations that a reader can follow by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from jaxserve.engine.plan import NO_TOKEN, StepPlan
from jaxserve.engine.request import FinishReason, GenerationRequest, Request
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.budget import TokenBudget
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.errors import ConfigError, InvalidRequest, QueueFull
from tests.scheduler.fake_device import results_of

CONFIG = SchedulerConfig(
    num_pages=64,
    max_model_len=64,
    max_num_seqs=4,
    token_budget=8,
    buckets=(2, 4, 8),
    page_size=4,
    watermark=0.0,
    max_in_flight=1,
)


def make_request(
    name: str,
    num_prompt: int = 3,
    *,
    max_tokens: int = 4,
    sampling: SamplingParams | None = None,
    stop_token_ids: Sequence[int] = (),
    first_token: int = 0,
    salt: str = "",
) -> Request:
    prompt = tuple(range(first_token, first_token + num_prompt))
    generation = GenerationRequest(name, prompt, sampling or SamplingParams(), cache_salt=salt)
    return Request(generation, max_tokens, 0, frozenset(stop_token_ids), arrival_s=0.0)


def commit(
    scheduler: Scheduler, plan: StepPlan, token_id: int = 99
) -> list[tuple[str, int | None]]:
    """Commits with the same sampled token everywhere; (request, token or None) by update."""
    token_ids = [row.target if row.target >= 0 else token_id for row in plan.sample_rows()]
    updates = scheduler.commit(
        plan, results_of(plan.step_id, token_ids, [-1.0] * len(token_ids)), 0.0
    )
    return [(u.request.request_id, u.token_ids[0] if u.token_ids else None) for u in updates]


def plan_step(scheduler: Scheduler, now_s: float = 0.0) -> StepPlan:
    plan = scheduler.plan(now_s)
    assert plan is not None
    return plan


def timeline(plan: StepPlan) -> tuple[list[str], list[tuple[str, int, int]]]:
    decodes = [chunk.request_id for chunk in plan.decodes]
    return decodes, [(c.request_id, c.start, c.num_tokens) for c in plan.prefills]


def test_golden_timeline_two_decodes_two_arrivals() -> None:
    """A and B decode; C and D arrive and are prefilled in chunks beside them."""
    scheduler = Scheduler(CONFIG)
    for name in "ab":
        scheduler.add(make_request(name, 3, max_tokens=10))
    steps = [plan_step(scheduler)]
    commit(scheduler, steps[0])
    scheduler.add(make_request("c", 14))
    scheduler.add(make_request("d", 5, first_token=50))
    for _ in range(5):
        steps.append(plan_step(scheduler))
        commit(scheduler, steps[-1])
    assert [timeline(step) for step in steps] == [
        ([], [("a", 0, 3), ("b", 0, 3)]),
        (["a", "b"], [("c", 0, 6)]),
        (["a", "b"], [("c", 6, 6)]),
        (["a", "b"], [("c", 12, 2), ("d", 0, 4)]),
        (["a", "b", "c"], [("d", 4, 1)]),
        (["a", "b", "c", "d"], []),
    ]
    assert [step.num_rows_bucket for step in steps] == [8, 8, 8, 8, 4, 4]


def test_steps_in_flight_follow_each_other_without_results() -> None:
    scheduler = Scheduler(replace(CONFIG, max_in_flight=4))
    scheduler.add(make_request("a", 10, max_tokens=3))
    steps = [plan_step(scheduler) for _ in range(4)]
    assert [timeline(step) for step in steps] == [
        ([], [("a", 0, 8)]),
        ([], [("a", 8, 2)]),
        (["a"], []),
        (["a"], []),
    ]
    assert [chunk.start for step in steps[2:] for chunk in step.decodes] == [10, 11]
    assert scheduler.plan(0.0) is None  # All of max_tokens is planned, and the pipe is full.
    assert [commit(scheduler, step) for step in steps] == [
        [],
        [("a", 99)],
        [("a", 99)],
        [("a", 99)],
    ]
    assert not scheduler.has_work


def test_without_chained_decodes_a_sequence_is_in_one_step_at_most() -> None:
    scheduler = Scheduler(replace(CONFIG, max_in_flight=2, chain_decodes=False))
    scheduler.add(make_request("a", 10))
    scheduler.add(make_request("b", 3, first_token=50))
    first, second = plan_step(scheduler), plan_step(scheduler)
    assert timeline(first) == ([], [("a", 0, 8)])
    assert timeline(second) == ([], [("b", 0, 3)])
    assert scheduler.plan(0.0) is None
    commit(scheduler, first)
    assert timeline(plan_step(scheduler)) == ([], [("a", 8, 2)])


def test_a_stop_id_ends_the_request_and_its_step_in_flight_is_ignored() -> None:
    scheduler = Scheduler(replace(CONFIG, max_in_flight=2))
    request = make_request("a", 4, stop_token_ids=[7], max_tokens=9)
    scheduler.add(request)
    first, second = plan_step(scheduler), plan_step(scheduler)
    results = results_of(first.step_id, [7], [-1.0])
    (update,) = scheduler.commit(first, results, 0.0)
    assert (update.token_ids, update.finish_reason) == ((7,), FinishReason.STOP)
    assert update.stop_token_id == 7
    assert (scheduler.num_running, scheduler.pages.num_held) == (0, 2)
    assert scheduler.has_work
    scheduler.check_integrity()
    assert commit(scheduler, second) == []
    assert scheduler.pages.num_held == 0
    assert request.output_token_ids == [7]
    assert not scheduler.has_work


def test_stop_ids_count_only_after_min_tokens() -> None:
    scheduler = Scheduler(CONFIG)
    sampling = SamplingParams(min_tokens=2)
    scheduler.add(make_request("a", sampling=sampling, stop_token_ids=[7], max_tokens=9))
    for expected in (None, None, FinishReason.STOP):
        plan = plan_step(scheduler)
        (update,) = scheduler.commit(plan, results_of(plan.step_id, [7], [-1.0]), 0.0)
        assert update.finish_reason is expected


def test_length_limits() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(make_request("one", 3, max_tokens=1))
    scheduler.add(make_request("full", 62, max_tokens=2))
    seen: list[tuple[str, int | None]] = []
    while scheduler.has_work:
        seen += commit(scheduler, plan_step(scheduler))
    assert seen == [("one", 99), ("full", 99), ("full", 99)]


@pytest.mark.parametrize(("num_prompt", "max_tokens"), [(0, 1), (64, 1), (60, 5), (3, 0)])
def test_a_request_that_can_never_fit_is_refused(num_prompt: int, max_tokens: int) -> None:
    scheduler = Scheduler(CONFIG)
    with pytest.raises(InvalidRequest, match="--max-model-len 64"):
        scheduler.add(make_request("a", num_prompt, max_tokens=max_tokens))
    assert not scheduler.has_work


def test_an_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    scheduler = Scheduler(replace(CONFIG, max_in_flight=2))
    scheduler.add(make_request("a"))
    with pytest.raises(InvalidRequest, match="in use"):
        scheduler.add(make_request("a"))
    plan = plan_step(scheduler)
    with pytest.raises(InvalidRequest, match="in use"):
        scheduler.add(make_request("a"))
    assert scheduler.finish("a", FinishReason.CANCELLED) is not None
    scheduler.add(make_request("a", 5))  # The old one's step is still in flight.
    second = plan_step(scheduler)
    assert timeline(second) == ([], [("a", 0, 5)])
    assert commit(scheduler, plan) == []
    assert commit(scheduler, second) == [("a", 99)]
    scheduler.check_integrity()


def test_the_queue_is_bounded_in_requests_and_in_tokens() -> None:
    scheduler = Scheduler(replace(CONFIG, max_queued_requests=2, max_queued_tokens=10))
    scheduler.add(make_request("a", 30))  # Nothing else waits, so it is let in.
    with pytest.raises(QueueFull, match="--max-queued-tokens"):
        scheduler.add(make_request("b", 1))
    commit(scheduler, plan_step(scheduler))
    assert (scheduler.num_running, scheduler.num_waiting_tokens) == (1, 0)
    for name in "bc":
        scheduler.add(make_request(name, 4))
    with pytest.raises(QueueFull, match="--max-queued-requests"):
        scheduler.add(make_request("d", 1))
    assert (scheduler.num_waiting, scheduler.num_waiting_tokens) == (2, 8)
    scheduler.finish("b", FinishReason.CANCELLED)
    scheduler.add(make_request("d", 1))
    assert scheduler.num_waiting_tokens == 5


def test_finish_is_idempotent_and_works_in_every_stage() -> None:
    scheduler = Scheduler(replace(CONFIG, max_num_seqs=1))
    running, waiting = make_request("running"), make_request("waiting")
    scheduler.add(running)
    scheduler.add(waiting)
    plan = plan_step(scheduler)
    assert scheduler.finish("waiting", FinishReason.DEADLINE) is waiting
    assert scheduler.finish("running", FinishReason.CANCELLED) is running
    assert scheduler.pages.num_held == 1
    for name in ("running", "waiting", "unknown"):
        assert scheduler.finish(name, FinishReason.ERROR) is None
    assert waiting.finish_reason is FinishReason.DEADLINE
    assert running.finish_reason is FinishReason.CANCELLED
    assert commit(scheduler, plan) == []
    assert (scheduler.pages.num_held, scheduler.has_work) == (0, False)


def test_commits_must_come_in_order_and_fit_the_plan() -> None:
    scheduler = Scheduler(replace(CONFIG, max_in_flight=2))
    scheduler.add(make_request("a"))
    first, second = plan_step(scheduler), plan_step(scheduler)
    with pytest.raises(ValueError, match="oldest"):
        commit(scheduler, second)
    with pytest.raises(ValueError, match="don't fit"):
        scheduler.commit(first, results_of(first.step_id, [1, 2], [0.0, 0.0]), 0.0)
    with pytest.raises(ValueError, match="don't fit"):
        scheduler.commit(first, results_of(second.step_id, [1], [0.0]), 0.0)
    assert commit(scheduler, first) == [("a", 99)]


def test_a_known_prefix_is_not_computed_again() -> None:
    scheduler = Scheduler(CONFIG)
    requests = [make_request(name, 8, max_tokens=1) for name in "ab"]
    requests.append(make_request("c", 8, max_tokens=1, salt="tenant"))
    plans = []
    for request in requests:
        scheduler.add(request)
        plans.append(plan_step(scheduler))
        commit(scheduler, plans[-1])
    # Of two equal full pages the last is computed again: one token has to be.
    assert [timeline(plan)[1] for plan in plans] == [[("a", 0, 8)], [("b", 4, 4)], [("c", 0, 8)]]
    first_page = plans[0].prefills[0].new_pages[0]
    assert plans[1].prefills[0].new_pages[0] == first_page
    assert [request.num_cached_tokens for request in requests] == [0, 4, 0]
    assert (scheduler.prefix_cache_hits, scheduler.prefix_cache_queries) == (4, 24)


def test_answers_to_one_prompt_share_its_full_pages_from_the_step_that_fills_them() -> None:
    config = replace(CONFIG, token_budget=32, buckets=(32,), max_in_flight=2)
    scheduler = Scheduler(config)
    requests = [make_request(name, 14) for name in "abcd"]
    for request in requests:
        scheduler.add(request)
    plan = plan_step(scheduler)
    # Three full pages are computed once; each has the half-full one to itself.
    assert timeline(plan)[1] == [("a", 0, 14), ("b", 12, 2), ("c", 12, 2), ("d", 12, 2)]
    tables = [chunk.new_pages for chunk in plan.prefills]
    assert len({table[:3] for table in tables}) == 1
    assert len({table[3] for table in tables}) == 4
    assert scheduler.pages.num_held == 3 + 4
    # Whoever computes them may go before the step is done: the others keep them.
    scheduler.finish("a", FinishReason.CANCELLED)
    while scheduler.has_work:
        commit(scheduler, plan)
        scheduler.check_integrity()
        following = scheduler.plan(0.0)
        if following is not None:
            plan = following
    assert all(len(request.output_token_ids) == 4 for request in requests[1:])
    assert scheduler.pages.num_available == config.num_pages


def test_nobody_begins_with_pages_of_a_request_that_failed() -> None:
    scheduler = Scheduler(replace(CONFIG, token_budget=16, buckets=(16,)))
    failing, beside, later = (make_request(name, 9) for name in ("failing", "beside", "later"))
    scheduler.add(failing)
    scheduler.add(beside)
    plan = plan_step(scheduler)
    assert timeline(plan)[1] == [("failing", 0, 9), ("beside", 8, 1)]
    commit(scheduler, plan, token_id=NO_TOKEN)
    assert failing.finish_reason is beside.finish_reason is FinishReason.ERROR
    scheduler.add(later)
    assert timeline(plan_step(scheduler))[1] == [("later", 0, 9)]
    scheduler.check_integrity()


def test_a_preempted_request_resumes_from_its_cached_pages_with_its_output() -> None:
    config = replace(CONFIG, num_pages=6, max_model_len=24, token_budget=16, buckets=(16,))
    scheduler = Scheduler(config)
    old, young = (
        make_request(n, 8, max_tokens=14, first_token=t) for n, t in (("o", 0), ("y", 50))
    )
    scheduler.add(old)
    scheduler.add(young)
    plans: list[StepPlan] = []
    while scheduler.has_work:
        plans.append(plan_step(scheduler))
        commit(scheduler, plans[-1], token_id=90 + len(plans) % 5)
        scheduler.check_integrity()
    preempting = [plan for plan in plans if plan.preempted]
    assert [plan.preempted for plan in preempting] == [("y",)]
    assert timeline(preempting[0])[0] == ["o"]
    (resume,) = [plan for plan in plans if plan.slot_loads and plan is not plans[0]]
    (load,), (chunk,) = resume.slot_loads, resume.prefills
    assert load.prompt_token_ids == young.generation.prompt_token_ids
    assert load.output_token_ids == tuple(young.output_token_ids[: len(load.output_token_ids)])
    assert load.output_token_ids
    assert chunk.samples
    assert chunk.start + chunk.num_tokens == 8 + len(load.output_token_ids)
    assert chunk.token_ids[-1] == load.output_token_ids[-1]
    assert len(young.output_token_ids) == len(old.output_token_ids) == 14
    assert (scheduler.num_preemptions, young.num_preemptions) == (1, 1)


def test_victims_are_preempted_only_once_nothing_is_in_flight() -> None:
    config = replace(CONFIG, num_pages=6, max_model_len=24, max_in_flight=2)
    scheduler = Scheduler(config)
    for name, first_token in (("o", 0), ("y", 50)):
        scheduler.add(make_request(name, 4, max_tokens=14, first_token=first_token))
    in_flight: list[StepPlan] = []
    while scheduler.num_preemptions == 0:
        plan = scheduler.plan(0.0)
        if plan is None:
            commit(scheduler, in_flight.pop(0))
        else:
            in_flight.append(plan)
    assert in_flight[-1].preempted == ("y",)
    assert len(in_flight) == scheduler.num_in_flight == 1


def test_prompt_logprobs_take_the_free_sample_rows_and_are_read_in_order() -> None:
    scheduler = Scheduler(CONFIG)
    scheduler.add(make_request("a", 2, max_tokens=8))
    commit(scheduler, plan_step(scheduler))
    sampling = SamplingParams(prompt_logprobs=2, logprobs=1)
    scored = make_request("s", 8, sampling=sampling, first_token=20)
    scheduler.add(scored)
    scheduler.add(make_request("late", 2, first_token=50))
    plans, entries = [], []
    while not scored.output_token_ids:
        plan = plan_step(scheduler)
        plans.append(plan)
        token_ids = [row.target if row.target >= 0 else 99 for row in plan.sample_rows()]
        values = [-row.position / 8 for row in plan.sample_rows()]
        for update in scheduler.commit(plan, results_of(plan.step_id, token_ids, values), 0.0):
            if update.request is scored:
                entries += update.prompt_logprobs
                last = update
    # Four sample rows a step, one of them the decode's: three rows go forward.
    assert [timeline(plan)[1][0] for plan in plans] == [("s", 0, 3), ("s", 3, 3), ("s", 6, 2)]
    assert [entry.token_id for entry in entries] == list(range(21, 28))
    assert [entry.logprob for entry in entries] == [-position / 8 for position in range(7)]
    assert [len(entry.top) for entry in entries] == [2] * 7
    assert last.token_ids == (99,)
    assert [(e.token_id, e.logprob, e.rank, len(e.top)) for e in last.logprobs] == [
        (99, -0.875, 1, 1)
    ]


def test_prompt_logprobs_go_forward_beside_decodes_in_every_other_slot() -> None:
    scheduler = Scheduler(CONFIG)
    for name in "abc":
        scheduler.add(make_request(name, 2, max_tokens=40))
    commit(scheduler, plan_step(scheduler))
    sampling = SamplingParams(prompt_logprobs=0)
    scheduler.add(make_request("s", 6, sampling=sampling, first_token=20))
    for start in range(6):
        plan = plan_step(scheduler)
        assert timeline(plan) == (["a", "b", "c"], [("s", start, 1)])
        commit(scheduler, plan)


class ShrinkingBudget(TokenBudget):
    """Large enough for the first step's prefills, then below the decodes' number."""

    def __init__(self) -> None:
        super().__init__(8)
        self.limits = [8, 1, 1]

    def max_rows(self) -> int:
        return self.limits.pop(0)


def test_a_budget_below_the_decodes_stops_prefills_but_no_decode() -> None:
    scheduler = Scheduler(CONFIG, budget=ShrinkingBudget())
    for name in "abc":
        scheduler.add(make_request(name, 2))
    commit(scheduler, plan_step(scheduler))
    scheduler.add(make_request("late", 2))
    for _ in range(2):
        plan = plan_step(scheduler)
        assert timeline(plan) == (["a", "b", "c"], [])
        commit(scheduler, plan)


def test_first_scheduled_is_recorded_once() -> None:
    scheduler = Scheduler(CONFIG)
    request = make_request("a", 12)
    scheduler.add(request)
    for now_s in (5.0, 6.0):
        commit(scheduler, plan_step(scheduler, now_s))
    assert request.first_scheduled_s == 5.0


def test_an_unknown_policy_is_a_configuration_error() -> None:
    with pytest.raises(ConfigError, match="--policy"):
        Scheduler(replace(CONFIG, policy="lottery"))


@pytest.mark.parametrize(
    ("change", "flag"),
    [
        ({"num_pages": 15}, "--kv-cache-bytes"),
        ({"max_num_seqs": 9}, "--max-num-seqs"),
        ({"token_budget": 9}, "--token-budget"),
        ({"buckets": (8, 4)}, "--buckets"),
        ({"watermark": 0.5}, "--watermark"),
    ],
)
def test_limits_that_cannot_work_are_configuration_errors(
    change: dict[str, object], flag: str
) -> None:
    with pytest.raises(ConfigError, match=flag):
        replace(CONFIG, **change)
