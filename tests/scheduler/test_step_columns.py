"""Decodes and their updates are kept in columns: row by row they say what chunks would."""

from __future__ import annotations

from dataclasses import replace

from jaxserve.engine.plan import Chunk, Decodes, SampleRow, StepPlan
from jaxserve.engine.request import FinishReason, GenerationRequest, Request
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.scheduler import Scheduler
from tests.scheduler.fake_device import results_of

CONFIG = SchedulerConfig(
    num_pages=16, max_model_len=16, max_num_seqs=4, token_budget=8, buckets=(4, 8), page_size=4
)
STOP = 7


def decode(name: str, slot: int, position: int, pages: tuple[int, ...] = ()) -> Chunk:
    return Chunk(name, slot, position, 1, (), True, pages)


def test_decodes_give_back_their_chunks() -> None:
    chunks = [decode("a", 3, 8), decode("b", 0, 4, (9,)), decode("c", 1, 0, (2, 5))]
    decodes = Decodes.of(chunks)
    assert list(decodes) == chunks
    assert len(decodes) == 3
    assert decodes.new_pages == ((1, (9,)), (2, (2, 5)))
    assert not Decodes()


def test_a_plan_counts_rows_and_pages_of_both_kinds() -> None:
    prefill = Chunk("p", 2, 4, 3, (1, 2, 3), True, (6,), logprob_targets=(2, 3))
    plan = StepPlan(0, 8, Decodes.of([decode("a", 3, 8), decode("b", 0, 4, (9,))]), (prefill,))
    assert list(plan.new_pages) == [(0, (9,)), (2, (6,))]
    assert list(plan.sample_rows()) == [
        SampleRow(3, 0, 8, -1),
        SampleRow(0, 1, 4, -1),
        SampleRow(2, 2, 4, 2),
        SampleRow(2, 3, 5, 3),
        SampleRow(2, 4, 6, -1),
    ]


def test_updates_come_in_row_order_whatever_each_row_gave() -> None:
    """Plain tokens around one that stops its request, and none for one that was cancelled."""
    scheduler = Scheduler(CONFIG)
    for name in "abcd":
        generation = GenerationRequest(name, (1, 2))
        scheduler.add(Request(generation, 9, 0, frozenset((STOP,)), arrival_s=0.0))
    first = scheduler.plan(0.0)
    assert first is not None
    second = scheduler.plan(0.0)
    assert second is not None
    scheduler.commit(first, results_of(first.step_id, [5] * 4, [0.0] * 4), 0.0)
    scheduler.finish("c", FinishReason.CANCELLED)
    updates = scheduler.commit(second, results_of(second.step_id, [5, STOP, 5, 6], [0.0] * 4), 0.0)
    seen = [(u.request.request_id, u.token_ids, u.finish_reason) for u in updates]
    assert seen == [("a", (5,), None), ("b", (STOP,), FinishReason.STOP), ("d", (6,), None)]
    assert seen == [(u.request.request_id, u.token_ids, u.finish_reason) for u in updates]


def test_decodes_are_where_their_requests_are_now() -> None:
    """The same requests decode as in the last step with decodes, in other slots."""
    scheduler = Scheduler(replace(CONFIG, token_budget=16, buckets=(4, 16)))

    def step() -> StepPlan:
        plan = scheduler.plan(0.0)
        assert plan is not None
        tokens = [5] * plan.num_sample_rows
        scheduler.commit(plan, results_of(plan.step_id, tokens, [0.0] * len(tokens)), 0.0)
        return plan

    requests = [Request(GenerationRequest(name, (1, 2)), 9, 0, frozenset(), 0.0) for name in "ab"]
    for request in requests:
        scheduler.add(request)
    assert not step().decodes
    before = step().decodes
    scheduler.lose_steps()
    urgent = GenerationRequest("c", (1, 2), priority=-1)
    scheduler.add(Request(urgent, 1, 0, frozenset(), 0.0))
    assert [chunk.request_id for chunk in step().prefills] == ["c", "a", "b"]
    after = step().decodes
    assert after.request_ids == before.request_ids == ("a", "b")
    assert after.slots == tuple(request.slot for request in requests) != before.slots
