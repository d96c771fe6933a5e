"""The loop on a virtual clock, without a thread."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.detokenizer import DetokenizerFactory
from jaxserve.engine.inbox import Arrival, Inbox
from jaxserve.engine.loop import Committed, EngineLoop
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.output import OutputProcessor
from jaxserve.engine.request import FinishReason, Request, RequestOutput
from tests.engine.engine_rig import CollectingSink, make_scheduler, request
from tests.engine.hash_executor import HashExecutor, hashed_token, scripted_token
from tests.engine.tiny_tokenizers import EOS, byte_tokenizer

TOKENIZER = byte_tokenizer()


class VirtualClock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class TimedExecutor(HashExecutor):
    """Each completion takes `step_s` of virtual time."""

    def __init__(self, clock: VirtualClock, **settings: Any) -> None:
        super().__init__(**settings)
        self._clock = clock
        self.virtual_step_s = 0.0

    def next_completion(self):  # type: ignore[no-untyped-def]
        self._clock.now_s += self.virtual_step_s
        return super().next_completion()


class Rig:
    def __init__(self, *, token_of=None, depth: int = 2, **scheduler: Any) -> None:  # type: ignore[no-untyped-def]
        self.clock = VirtualClock()
        token_of = token_of or hashed_token(EOS)
        self.executor = TimedExecutor(self.clock, token_of=token_of, depth=depth)
        self.executor.virtual_step_s = 1.0
        self.scheduler = make_scheduler(max_in_flight=depth, **scheduler)
        self.inbox = Inbox(max_queued_requests=1000, max_queued_tokens=100000)
        self.metrics = EngineMetrics()
        self.outputs = OutputProcessor(DetokenizerFactory(TOKENIZER), self.metrics)
        self.loop = EngineLoop(
            self.scheduler, self.executor, self.inbox, self.outputs, self.metrics, self.clock
        )
        self.sink = CollectingSink()
        self.committed: Committed | None = None

    def add(
        self, request_id: str, prompt: bytes = b"hi", sink: Any = None, **sampling: Any
    ) -> None:
        generation = request(request_id, prompt, **sampling)
        max_tokens = generation.sampling.max_tokens or 64 - len(prompt)
        self.inbox.put(
            Arrival(
                Request(
                    generation,
                    max_tokens=max_tokens,
                    seed=generation.sampling.seed or 0,
                    stop_token_ids=frozenset({EOS, *generation.sampling.stop_token_ids}),
                    arrival_s=self.clock(),
                ),
                sink or self.sink,
            )
        )

    def turn(self) -> None:
        self.committed = self.loop.turn(self.committed)

    def run(self, max_turns: int = 2000) -> None:
        for _ in range(max_turns):
            self.turn()
            if self.committed is None and not self.scheduler.has_work:
                break
        else:
            raise AssertionError("the loop did not come to an end")
        self.scheduler.check_integrity()
        assert self.outputs.num_open == 0


def test_the_device_gets_its_next_step_before_text_is_made() -> None:
    rig = Rig()

    class Marking(CollectingSink):
        def deliver(self, outputs: Sequence[RequestOutput]) -> None:
            super().deliver(outputs)
            rig.executor.calls.append("deliver")

    rig.add("a", max_tokens=5, sink=Marking())
    rig.run()
    calls = rig.executor.calls
    assert calls[:3] == ["submit 0", "submit 1", "complete 0"]
    # Step k+2 is on its way when the text of step k is made.
    assert calls[3:9] == ["submit 2", "deliver", "complete 1", "submit 3", "deliver", "complete 2"]


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_depth_does_not_change_the_outputs(depth: int) -> None:
    rig = Rig(depth=depth)
    for index in range(6):
        rig.add(f"r{index}", b"x" * (5 * index + 1), seed=index, max_tokens=9)
    rig.run()
    reference = Rig(depth=2)
    for index in range(6):
        reference.add(f"r{index}", b"x" * (5 * index + 1), seed=index, max_tokens=9)
        reference.run()
    for index in range(6):
        assert rig.sink.token_ids(f"r{index}") == reference.sink.token_ids(f"r{index}")


def test_a_stop_string_ends_the_request_one_step_later_and_drops_the_rest() -> None:
    rig = Rig(token_of=scripted_token({"a": b"abENDxyz"}))
    rig.add("a", stop=("END",))
    rig.run()
    assert rig.sink.text("a") == "ab"
    assert bytes(rig.sink.token_ids("a")) == b"abEND"
    assert rig.sink.finals() == {"a": [FinishReason.STOP]}
    # 5 tokens need 5 steps; at most `depth` further ones were on their way.
    assert len(rig.executor.plans) <= 7


def test_host_gap_is_zero_when_a_step_is_in_flight_and_idle_time_is_no_gap() -> None:
    rig = Rig()
    rig.add("a", max_tokens=5)
    rig.run()
    first = list(rig.metrics.recent_steps)
    assert [step.host_gap_s for step in first] == [0.0] * len(first)
    assert [step.step_s for step in first] == [1.0] * len(first)
    rig.clock.now_s += 50.0  # idle
    rig.add("b", max_tokens=2)
    rig.loop.wait_for_work()
    rig.run()
    assert max(step.host_gap_s for step in rig.metrics.recent_steps) == 0.0


def test_host_gap_shows_the_hosts_time_when_the_device_waits() -> None:
    rig = Rig(depth=1)

    class Slow(CollectingSink):
        def deliver(self, outputs: Sequence[RequestOutput]) -> None:
            super().deliver(outputs)
            rig.clock.now_s += 0.25

    plan = rig.scheduler.plan

    def slow_plan(now_s: float):  # type: ignore[no-untyped-def]
        rig.clock.now_s += 0.125
        return plan(now_s)

    rig.scheduler.plan = slow_plan  # type: ignore[method-assign]
    rig.add("a", max_tokens=4, sink=Slow())
    rig.run()
    steps = list(rig.metrics.recent_steps)
    # Text work overlaps the step in flight: only planning shows as a gap.
    assert [step.host_gap_s for step in steps] == [0.125] * 4
    assert [step.step_s for step in steps][1:] == [1.25] * 3
    assert [step.device_wait_s for step in steps] == [1.0] * 4


def test_planning_beside_a_step_in_flight_is_no_host_gap() -> None:
    rig = Rig(depth=2)
    plan = rig.scheduler.plan

    def slow_plan(now_s: float):  # type: ignore[no-untyped-def]
        rig.clock.now_s += 0.125
        return plan(now_s)

    rig.scheduler.plan = slow_plan  # type: ignore[method-assign]
    rig.add("a", max_tokens=4)
    rig.run()
    assert [step.host_gap_s for step in rig.metrics.recent_steps] == [0.125, 0.0, 0.0, 0.0]


def test_fill_counts_tokens_over_bucket_rows() -> None:
    rig = Rig()
    rig.add("a", b"x" * 9, max_tokens=3)
    rig.run()
    assert [(s.num_tokens, s.num_rows_bucket) for s in rig.metrics.recent_steps] == [
        (9, 16),
        (1, 4),
        (1, 4),
    ]
    assert (rig.metrics.num_step_tokens, rig.metrics.num_step_rows) == (11, 24)


def test_usage_and_latencies_are_on_the_engines_clock() -> None:
    rig = Rig(max_num_seqs=1)
    rig.add("a", max_tokens=3)
    rig.add("b", max_tokens=2)
    rig.run()
    a, b = (rig.sink.outputs(name)[-1].usage for name in "ab")
    assert a is not None
    assert b is not None
    assert (a.queue_s, a.ttft_s, a.e2e_s) == (0.0, 1.0, 3.0)
    assert (a.num_prompt_tokens, a.num_output_tokens) == (2, 3)
    assert b.queue_s >= 2.0
    assert b.ttft_s > b.queue_s
    histogram = rig.metrics.inter_token_latency_seconds
    assert (histogram.count, histogram.sum) == (3, 3.0)
    assert rig.metrics.time_to_first_token_seconds.count == 2


def test_an_end_that_crosses_a_finished_step_gives_one_last_output() -> None:
    rig = Rig()
    rig.add("a", max_tokens=1)
    rig.turn()  # committed, with a finish reason, not yet emitted
    assert rig.inbox.end("a", FinishReason.CANCELLED)
    rig.run()
    assert rig.sink.finals() == {"a": [FinishReason.LENGTH]}


def test_tokens_committed_before_an_end_are_still_delivered() -> None:
    rig = Rig()
    rig.add("a", max_tokens=30)
    for _ in range(3):
        rig.turn()
    num_delivered = len(rig.sink.token_ids("a"))
    rig.inbox.end("a", FinishReason.CANCELLED)
    rig.run()
    assert len(rig.sink.token_ids("a")) == num_delivered + 1
    assert rig.sink.finals() == {"a": [FinishReason.CANCELLED]}


def test_arrival_and_end_in_one_mail_leave_nothing_behind() -> None:
    rig = Rig()
    rig.add("a")
    rig.inbox.end("a", FinishReason.CANCELLED)
    rig.run()
    assert rig.sink.finals() == {"a": [FinishReason.CANCELLED]}
    assert not rig.scheduler.has_work
    assert rig.executor.plans == []


def test_a_preemption_that_fills_the_queue_costs_no_accepted_request() -> None:
    rig = Rig(max_queued_requests=2)
    for index in range(4):  # as if the scheduler's queue had filled meanwhile
        rig.add(f"r{index}", max_tokens=3)
    rig.run()
    assert rig.sink.finals() == {f"r{index}": [FinishReason.LENGTH] for index in range(4)}


def test_ends_reach_requests_that_the_queue_had_no_room_for() -> None:
    rig = Rig(max_queued_requests=1, max_num_seqs=1)
    for index in range(4):
        rig.add(f"r{index}", max_tokens=30)
    rig.turn()
    assert rig.inbox.end("r3", FinishReason.CANCELLED)
    rig.turn()
    assert rig.sink.finals() == {"r3": [FinishReason.CANCELLED]}
    rig.run()
    assert len(rig.sink.finals()) == 4
    assert "r3" not in {chunk.request_id for plan in rig.executor.plans for chunk in plan.chunks}


def test_deadlines_of_finished_requests_are_forgotten() -> None:
    rig = Rig()
    for _ in range(500):
        generation = replace(request("x", max_tokens=1), deadline_s=1e9)
        rig.inbox.put(Arrival(Request(generation, 1, 0, frozenset(), rig.clock()), rig.sink))
        rig.run()
    assert len(rig.loop._deadlines) < 100
    assert rig.sink.finals() == {"x": [FinishReason.LENGTH] * 500}


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_request_ends_exactly_once_whatever_happens(data: st.DataObject) -> None:
    depth = data.draw(st.sampled_from([1, 2, 3]))
    rig = Rig(
        depth=depth,
        num_pages=data.draw(st.sampled_from([17, 24, 64])),
        max_num_seqs=data.draw(st.sampled_from([1, 4, 8])),
        max_queued_requests=data.draw(st.sampled_from([2, 100])),
        watermark=0.0,
    )
    ended_by: dict[str, FinishReason] = {}
    num_added = data.draw(st.integers(1, 12))
    for index in range(num_added):
        name = f"r{index}"
        rig.add(
            name,
            b"ab" * data.draw(st.integers(1, 20)),
            seed=index,
            max_tokens=data.draw(st.integers(1, 24)),
            stop=data.draw(st.sampled_from([(), ("e",), ("\ufffd",)])),
        )
        for _ in range(data.draw(st.integers(0, 4))):
            rig.turn()
        if data.draw(st.booleans()):
            victim = f"r{data.draw(st.integers(0, index))}"
            if rig.inbox.end(victim, FinishReason.CANCELLED):
                ended_by[victim] = FinishReason.CANCELLED
    rig.run()
    finals = rig.sink.finals()
    assert finals.keys() == {f"r{index}" for index in range(num_added)}
    for name, reasons in finals.items():
        assert len(reasons) == 1
        assert reasons[0] is not FinishReason.CANCELLED or name in ended_by
        last = rig.sink.outputs(name)[-1]
        assert last.finish_reason is not None, "nothing follows the last output"
        assert last.usage is not None
        assert last.usage.num_output_tokens == len(rig.sink.token_ids(name))
    assert rig.inbox.num_queued == (0, 0)
    assert rig.inbox.wait_until_none_live(0.0)
    assert sum(rig.metrics.num_finished.values()) == num_added
