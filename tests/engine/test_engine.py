from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from jaxserve.engine.engine import Engine
from jaxserve.engine.request import FinishReason, GenerationRequest, RequestOutput
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import InvalidRequest, NotAccepting, QueueFull
from tests.engine.engine_rig import CollectingSink, make_engine, request
from tests.engine.hash_executor import HashExecutor, hashed_token, scripted_token
from tests.engine.tiny_tokenizers import EOS


def wait_until(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + 10.0
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.002)


@pytest.fixture
def started(request: pytest.FixtureRequest) -> Iterator[list[Engine]]:
    """Engines put here are stopped, and their pages checked, at the end."""
    engines: list[Engine] = []
    yield engines
    for engine in engines:
        engine.stop()
        if not engine.snapshot().failed:
            engine._scheduler.check_integrity()
            assert engine.snapshot().num_running == 0


def test_many_threads_get_each_stream_whole(started: list[Engine]) -> None:
    engine, executor = make_engine()
    started.append(engine)
    engine.start()
    sinks = [CollectingSink() for _ in range(4)]

    def feed(index: int) -> None:
        for number in range(10):
            engine.add(request(f"{index}-{number}", seed=number, max_tokens=7), sinks[index])

    threads = [threading.Thread(target=feed, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, sink in enumerate(sinks):
        ids = [f"{index}-{number}" for number in range(10)]
        sink.wait_finished(*ids)
        assert sink.finals() == {request_id: [FinishReason.LENGTH] for request_id in ids}
        for number, request_id in enumerate(ids):
            alone = CollectingSink()
            engine.add(request("alone", seed=number, max_tokens=7), alone)
            alone.wait_finished("alone")
            assert sink.token_ids(request_id) == alone.token_ids("alone")
    assert engine.metrics.num_finished[FinishReason.LENGTH] == 80
    assert engine.metrics.num_generation_tokens == 80 * 7
    assert engine.metrics.num_prompt_tokens == 80 * 2
    assert executor.depth == 2


@pytest.mark.parametrize(
    ("prompt", "sampling", "field"),
    [
        (b"", {}, "prompt"),
        (b"x" * 64, {}, "prompt"),
        (b"x" * 60, {"min_tokens": 5}, "min_tokens"),
        (
            b"x",
            {"min_tokens": 2, "allowed_token_ids": (5, 6), "stop_token_ids": (5, 6)},
            "min_tokens",
        ),
        (b"x", {"top_p": 0.0}, "top_p"),
        (b"x", {"stop_token_ids": (257,)}, "stop_token_ids"),
    ],
)
def test_what_cannot_be_served_is_refused_by_field(
    prompt: bytes, sampling: dict[str, object], field: str
) -> None:
    engine, _ = make_engine()
    with pytest.raises(InvalidRequest) as caught:
        engine.add(request("a", prompt, **sampling), CollectingSink())
    assert caught.value.field == field
    assert engine.snapshot().num_waiting == 0


def test_token_ids_must_be_in_range() -> None:
    engine, _ = make_engine()
    for bad in (-1, 257):
        with pytest.raises(InvalidRequest, match="prompt_token_ids"):
            engine.add(GenerationRequest("a", (1, bad), SamplingParams()), CollectingSink())


def test_an_overlong_prompt_is_told_the_limit_and_the_fix() -> None:
    engine, _ = make_engine()
    with pytest.raises(InvalidRequest, match=r"holds 64 tokens \(--max-model-len\).*at most 63"):
        engine.add(request("a", b"x" * 64), CollectingSink())


def test_max_tokens_is_cut_to_the_end_of_the_context(started: list[Engine]) -> None:
    engine, _ = make_engine()
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    engine.add(request("long", b"x" * 60, max_tokens=1000), sink)
    engine.add(request("absent", b"x" * 63), sink)
    sink.wait_finished("long", "absent")
    assert len(sink.token_ids("long")) == 4
    assert len(sink.token_ids("absent")) == 1
    assert sink.finals() == {"long": [FinishReason.LENGTH], "absent": [FinishReason.LENGTH]}


def test_an_absent_seed_is_drawn_anew_each_time(started: list[Engine]) -> None:
    engine, _ = make_engine()
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    for name in ("a", "b"):
        engine.add(request(name, seed=None, max_tokens=8), sink)
    sink.wait_finished("a", "b")
    assert sink.token_ids("a") != sink.token_ids("b")


def test_a_full_queue_refuses_in_the_callers_thread() -> None:
    engine, _ = make_engine(max_queued_requests=2, max_queued_tokens=10)
    sink = CollectingSink()  # The thread is not started: all stays in the inbox.
    engine.add(request("a", b"12345678"), sink)
    with pytest.raises(QueueFull, match="--max-queued-tokens"):
        engine.add(request("b", b"123"), sink)
    engine.add(request("c", b"12"), sink)
    with pytest.raises(QueueFull, match="--max-queued-requests"):
        engine.add(request("d", b"1"), sink)
    assert engine.snapshot().num_waiting == 2
    engine.start()
    sink.wait_finished("a", "c")
    engine.add(request("d", b"1"), sink)
    sink.wait_finished("d")
    engine.stop()


def test_a_live_id_is_refused_and_free_again_with_the_last_output(started: list[Engine]) -> None:
    engine, _ = make_engine(step_s=0.005)
    started.append(engine)
    engine.start()
    again = threading.Event()

    class Reusing(CollectingSink):
        def deliver(self, outputs: Sequence[RequestOutput]) -> None:
            super().deliver(outputs)
            if any(o.finish_reason for o in outputs) and not again.is_set():
                again.set()
                engine.add(request("a", max_tokens=2), self)

    sink = Reusing()
    engine.add(request("a", max_tokens=20), sink)
    with pytest.raises(InvalidRequest, match="request_id"):
        engine.add(request("a"), sink)
    sink.wait_for(lambda: sink.finals().get("a") == [FinishReason.LENGTH] * 2)


def test_stop_strings_end_a_request_and_never_show(started: list[Engine]) -> None:
    said = {"a": b"say STOP now", "b": b"say STO", "c": b"ab STOP"}
    engine, _ = make_engine(scripted_token(said))
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    engine.add(request("a", stop=("STOP",)), sink)
    engine.add(request("b", stop=("STOP",), max_tokens=7), sink)
    engine.add(request("c", stop=("STOP",), include_stop_str_in_output=True), sink)
    sink.wait_finished("a", "b", "c")
    assert (sink.text("a"), sink.text("b"), sink.text("c")) == ("say ", "say STO", "ab STOP")
    assert sink.token_ids("a") == tuple(b"say STOP")
    last = sink.outputs("a")[-1]
    assert (last.finish_reason, last.stop_match) == (FinishReason.STOP, "STOP")
    assert last.usage is not None
    assert last.usage.num_output_tokens == 8


def test_stop_ids_and_eos_show_in_the_ids_but_not_in_the_text(started: list[Engine]) -> None:
    said = {"a": b"abc!def", "b": b"abc!def"}

    def token_of(load, index):  # type: ignore[no-untyped-def]
        return EOS if index == 5 else scripted_token(said)(load, index)

    engine, _ = make_engine(token_of)
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    engine.add(request("a", stop_token_ids=(ord("!"),)), sink)
    engine.add(request("b", stop=("zzz",)), sink)
    engine.add(request("c", stop_token_ids=(ord("."),), include_stop_str_in_output=True), sink)
    engine.add(request("d", ignore_eos=True, max_tokens=7), sink)
    sink.wait_finished("a", "b", "c", "d")
    assert (sink.text("a"), sink.token_ids("a")) == ("abc", tuple(b"abc!"))
    assert sink.outputs("a")[-1].stop_match == ord("!")
    assert (sink.text("b"), sink.token_ids("b")[-1]) == ("abc!d", EOS)
    assert sink.outputs("b")[-1].stop_match == EOS
    assert sink.text("c") == "."
    assert sink.finals()["d"] == [FinishReason.LENGTH]


def test_min_tokens_also_holds_off_stop_strings(started: list[Engine]) -> None:
    engine, _ = make_engine(scripted_token({"a": b"xx-xx-xx-"}))
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    engine.add(request("a", stop=("xx",), min_tokens=3), sink)
    sink.wait_finished("a")
    assert sink.text("a") == "xx-"
    assert sink.finals()["a"] == [FinishReason.STOP]
    engine.add(request("a", stop=("-",), min_tokens=3), sink := CollectingSink())
    sink.wait_finished("a")
    assert sink.text("a") == "xx-xx", "the third token is one of the min_tokens"


def test_one_delivery_a_step_for_all_requests_of_a_sink(started: list[Engine]) -> None:
    engine, executor = make_engine()
    sink = CollectingSink()
    for name in "abcdefgh":
        engine.add(request(name, max_tokens=10), sink)
    started.append(engine)
    engine.start()
    sink.wait_finished(*"abcdefgh")
    assert len(sink.deliveries) <= len(executor.plans)
    assert max(len(batch) for batch in sink.deliveries) == 8


def test_abort_at_any_moment_gives_one_last_output(started: list[Engine]) -> None:
    engine, _ = make_engine(step_s=0.001, max_num_seqs=2)
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    for index in range(30):
        engine.add(request(f"r{index}", max_tokens=40), sink)
        if index % 3 == 0:
            time.sleep(0.003)
        assert engine.abort(f"r{index}")
        engine.abort(f"r{index}")
    sink.wait_finished(*(f"r{index}" for index in range(30)))
    assert engine.drain(5.0)
    assert set(map(tuple, sink.finals().values())) == {(FinishReason.CANCELLED,)}
    assert not engine.abort("r0")
    assert not engine.abort("never there")


def test_abort_ends_a_running_request_within_two_steps(started: list[Engine]) -> None:
    engine, executor = make_engine(step_s=0.02)
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    engine.add(request("a", max_tokens=60), sink)
    sink.wait_for(lambda: len(sink.token_ids("a")) >= 3)
    num_plans = len(executor.plans)
    engine.abort("a")
    sink.wait_finished("a")
    assert len(executor.plans) <= num_plans + 2


def test_a_deadline_ends_requests_that_run_and_that_wait(started: list[Engine]) -> None:
    engine, _ = make_engine(step_s=0.01, max_num_seqs=1)
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    now_s = time.monotonic()
    engine.add(request("runs", max_tokens=60, deadline_s=now_s + 0.1), sink)
    engine.add(request("waits", max_tokens=60, deadline_s=now_s + 0.05), sink)
    engine.add(request("late", deadline_s=now_s - 1.0), sink)
    engine.add(request("fine", max_tokens=3, deadline_s=now_s + 60.0), sink)
    sink.wait_finished("runs", "waits", "late", "fine")
    assert time.monotonic() - now_s < 20.0
    late = [sink.finals()[name] for name in ("runs", "waits", "late")]
    assert late == [[FinishReason.DEADLINE]] * 3
    assert 0 < len(sink.token_ids("runs")) < 60
    assert sink.token_ids("waits") == ()
    assert sink.finals()["fine"] == [FinishReason.LENGTH]


def test_drain_lets_everything_finish(started: list[Engine]) -> None:
    engine, _ = make_engine(step_s=0.002, max_num_seqs=2)
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    for name in "abcd":
        engine.add(request(name, max_tokens=10), sink)
    assert engine.drain(20.0)
    assert sink.finals() == {name: [FinishReason.LENGTH] for name in "abcd"}
    with pytest.raises(NotAccepting):
        engine.add(request("e"), sink)
    assert not engine.snapshot().accepting


def test_drain_cancels_what_is_left_when_time_is_up(started: list[Engine]) -> None:
    engine, _ = make_engine(step_s=0.02, max_num_seqs=1)
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    for name in "ab":
        engine.add(request(name, max_tokens=60), sink)
    assert not engine.drain(0.1)
    assert sink.finals() == {name: [FinishReason.CANCELLED] for name in "ab"}


def test_stop_ends_all_at_once_and_joins(started: list[Engine]) -> None:
    engine, _ = make_engine(step_s=0.02, max_num_seqs=1)
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    for name in "ab":
        engine.add(request(name, max_tokens=60), sink)
    sink.wait_for(lambda: len(sink.token_ids("a")) > 1)
    engine.stop()
    engine.stop()
    assert sink.finals() == {name: [FinishReason.CANCELLED] for name in "ab"}
    assert not engine._thread.is_alive()


class HangingExecutor(HashExecutor):
    """A device that comes to the end of no step until it is let go."""

    def __init__(self) -> None:
        super().__init__(hashed_token(EOS))
        self.let_go = threading.Event()

    def next_completion(self):  # type: ignore[no-untyped-def]
        self.let_go.wait(30.0)
        return super().next_completion()


def test_stop_returns_when_the_device_hangs() -> None:
    executor = HangingExecutor()
    engine, _ = make_engine(executor=executor)
    engine.start()
    sink = CollectingSink()
    engine.add(request("a", max_tokens=5), sink)
    wait_until(lambda: executor.plans)
    assert not engine.stop(timeout_s=0.05)
    executor.let_go.set()
    assert engine.stop()
    assert sink.finals() == {"a": [FinishReason.CANCELLED]}


def test_the_age_of_a_step_counts_from_its_submission_or_the_step_before() -> None:
    now_s = [0.0]
    executor = HangingExecutor()
    engine, _ = make_engine(executor=executor, clock=lambda: now_s[0])
    sink = CollectingSink()
    engine.start()
    now_s[0] = 1000.0  # A long idle time is nobody's fault.
    assert engine.snapshot().step_in_flight_s is None
    engine.add(request("a", max_tokens=3), sink)
    wait_until(lambda: len(executor.plans) == 2)
    assert engine.snapshot().step_in_flight_s == 0.0
    assert engine.snapshot().last_step_age_s is None
    now_s[0] = 1070.0  # The first step hangs.
    assert engine.snapshot().step_in_flight_s == 70.0
    executor.let_go.set()
    sink.wait_finished("a")
    wait_until(lambda: engine.snapshot().step_in_flight_s is None)
    assert engine.stop()


def test_a_step_that_waits_for_the_one_before_it_is_not_late() -> None:
    now_s = [0.0]
    engine, _ = make_engine(clock=lambda: now_s[0])
    engine.add(request("a", max_tokens=5), CollectingSink())
    now_s[0] = 10.0
    assert engine._loop.turn(None) is not None  # Two were submitted, one is complete.
    now_s[0] = 13.0
    assert engine.snapshot().step_in_flight_s == 3.0
    assert engine._loop.num_in_flight == 1


def test_an_end_that_comes_too_late_spares_the_next_request_of_that_id() -> None:
    engine, _ = make_engine()
    sink = CollectingSink()
    loop = engine._loop
    first = engine.add(request("a", max_tokens=1), sink)
    committed = loop.turn(None)  # Its only step is committed and not emitted yet:
    assert engine.abort("a"), "it is live until its last output leaves"
    assert engine.cancel(first)
    # ... and the mail of these two stays in the inbox while it does.
    loop.emit(committed)
    assert sink.finals() == {"a": [FinishReason.LENGTH]}
    second = engine.add(request("a", max_tokens=3), sink)
    assert not engine.cancel(first), "that one is gone, whoever has its id now"
    committed = None
    while len(sink.finals()["a"]) < 2:
        loop.wait_for_work()
        committed = loop.turn(committed)
    assert sink.finals() == {"a": [FinishReason.LENGTH] * 2}
    assert not engine.cancel(second)


def test_a_failing_device_ends_all_as_errors(
    started: list[Engine], caplog: pytest.LogCaptureFixture
) -> None:
    executor = HashExecutor(hashed_token(EOS))
    executor.fail_at_step = 3
    executor.failure = "prompt: secret words"
    engine, _ = make_engine(executor=executor, max_num_seqs=1)
    sink = CollectingSink()
    for name in "ab":
        engine.add(request(name, b"secret words", max_tokens=30), sink)
    with caplog.at_level(logging.DEBUG):
        engine.start()
        sink.wait_finished("a", "b")
        engine._thread.join()
    assert sink.finals() == {name: [FinishReason.ERROR] for name in "ab"}
    assert engine.snapshot().failed
    with pytest.raises(NotAccepting, match="failed"):
        engine.add(request("c"), sink)
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    # Where it failed, but not the exception's words: they may be a prompt's.
    assert "RuntimeError" in caplog.text
    assert "in submit" in caplog.text
    assert "secret" not in caplog.text
    assert engine.drain(1.0)
    started.append(engine)


def test_a_failure_of_one_request_leaves_the_others_alone(
    started: list[Engine], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "a piece of the prompt"
    engine, _ = make_engine(scripted_token({"good": b"fine", "bad": b"boom"}))
    lookup = engine._loop._outputs._detokenizers._token_bytes
    assert lookup is not None

    def look_up(self: object, token_id: int) -> bytes:
        if token_id == ord("m"):
            raise KeyError(secret)
        return bytes([token_id])

    monkeypatch.setattr(type(lookup), "_look_up", look_up)
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    engine.add(request("bad", max_tokens=6), sink)
    engine.add(request("good", max_tokens=6), sink)
    sink.wait_finished("bad", "good")
    assert sink.finals() == {"bad": [FinishReason.ERROR], "good": [FinishReason.LENGTH]}
    assert sink.text("good") == "fine.."
    assert not engine.snapshot().failed
    assert "'bad'" in caplog.text
    assert "KeyError" in caplog.text
    assert secret not in caplog.text


def test_a_broken_sink_costs_only_its_own_requests(started: list[Engine]) -> None:
    class Broken:
        def deliver(self, outputs: Sequence[RequestOutput]) -> None:
            raise RuntimeError("the reader is gone")

    engine, _ = make_engine()
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    engine.add(request("lost", max_tokens=50), Broken())
    engine.add(request("good", max_tokens=20), sink)
    sink.wait_finished("good")
    assert engine.drain(5.0)
    assert engine.metrics.num_finished[FinishReason.CANCELLED] == 1
    assert len(sink.token_ids("good")) == 20


def test_idle_costs_no_steps_and_no_turns(started: list[Engine]) -> None:
    engine, executor = make_engine()
    started.append(engine)
    turns = 0
    turn = engine._loop.turn

    def counting_turn(committed):  # type: ignore[no-untyped-def]
        nonlocal turns
        turns += 1
        return turn(committed)

    engine._loop.turn = counting_turn  # type: ignore[method-assign]
    engine.start()
    sink = CollectingSink()
    engine.add(request("a", max_tokens=3), sink)
    sink.wait_finished("a")
    time.sleep(0.1)
    before = turns, len(executor.plans)
    time.sleep(0.3)
    assert (turns, len(executor.plans)) == before


def test_idle_checks_the_pages_and_a_leak_makes_it_unhealthy() -> None:
    engine, _ = make_engine()
    engine.start()
    sink = CollectingSink()
    engine.add(request("a", max_tokens=3), sink)
    sink.wait_finished("a")
    time.sleep(0.1)
    engine._scheduler.pages._free.pop()
    deadline_s = time.monotonic() + 5.0
    while not engine.snapshot().failed and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert engine.snapshot().failed
    engine.stop()


def test_snapshot_counts(started: list[Engine]) -> None:
    engine, _ = make_engine(step_s=0.005, max_num_seqs=2)
    assert engine.snapshot().last_step_age_s is None
    started.append(engine)
    engine.start()
    sink = CollectingSink()
    for name in "abcd":
        engine.add(request(name, max_tokens=30), sink)
    sink.wait_for(lambda: len(sink.deliveries) > 3)
    busy = engine.snapshot()
    assert (busy.num_running, busy.num_waiting, busy.num_waiting_tokens) == (2, 2, 4)
    assert busy.num_pages_free < busy.num_pages_total == 64
    assert busy.last_step_age_s is not None
    assert busy.last_step_age_s < 1.0
    assert 0.0 < busy.mean_step_fill <= 1.0
    assert engine.drain(20.0)
    idle = engine.snapshot()
    assert (idle.num_running, idle.num_waiting) == (0, 0)
    assert idle.num_pages_free + idle.num_pages_cached == 64
