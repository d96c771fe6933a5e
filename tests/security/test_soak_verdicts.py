"""What `tools/soak.py` calls a failure."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tools.chaos.at_rest import AtRest
from tools.chaos.crowd import Watch
from tools.chaos.questions import NUM_OUTPUT_TOKENS, Answer, End, Questions
from tools.chaos.soak import Schedule, worst
from tools.chaos.soaked_server import Sample
from tools.chaos.verdicts import (
    Outcome,
    Verdict,
    judge_log,
    judge_memory,
    judge_overload,
    judge_pace,
    judge_rest,
    judge_tokens,
)

QUESTIONS = Questions([[1]], [list(range(NUM_OUTPUT_TOKENS))])
QUIET, BUSY, LATE = Watch(), Watch(cpu_share=0.95), Watch(num_ticks=100, num_late=2)
PAUSED = Watch(paused_s=30.0)
REST = AtRest(15, 23, 0, 0, 0)
MIB = 1 << 20


def _answer(end: End = End.WHOLE, *, num_tokens: int = NUM_OUTPUT_TOKENS) -> Answer:
    return Answer(0, 0.0, list(range(num_tokens)), message_s=[1.0, 7.0], end=end, ended_s=7.0)


def _fails(*verdicts: Verdict) -> list[str]:
    return [verdict.check for verdict in verdicts if verdict.outcome is Outcome.FAILS]


@pytest.mark.parametrize(
    ("answer", "is_right"),
    [
        (_answer(), True),
        (_answer(num_tokens=NUM_OUTPUT_TOKENS - 1), False),
        (_answer(num_tokens=NUM_OUTPUT_TOKENS + 1), False),
        (_answer(End.LEFT, num_tokens=3), True),
        (Answer(0, 0.0, [0, 2], end=End.LEFT), False),
        (Answer(0, 0.0, [0, 1, 1, 2], end=End.CUT), False),
        (_answer(End.REFUSED, num_tokens=0), True),
    ],
)
def test_a_token_lost_doubled_or_wrong_is_seen(answer: Answer, is_right: bool) -> None:
    verdicts = judge_tokens([_answer(), answer], QUESTIONS)
    assert _fails(*verdicts) == ([] if is_right else ["tokens lost, doubled or wrong"])


@pytest.mark.parametrize("end", [End.BROKEN, End.FAILED])
def test_a_stream_that_breaks_or_fails_is_seen(end: End) -> None:
    [_, verdict] = judge_tokens([_answer(), _answer(end, num_tokens=3)], QUESTIONS)
    assert verdict.outcome is Outcome.FAILS


def test_no_whole_answer_at_all_is_a_failure() -> None:
    assert _fails(*judge_tokens([_answer(End.REFUSED, num_tokens=0)], QUESTIONS))


def test_goodput_below_nine_tenths_of_the_peak_fails() -> None:
    held, lost = (
        judge_overload([10.0, 20.0], [good, 2 * good], [_answer()], [QUIET]) for good in (9.1, 8.9)
    )
    assert not _fails(*held)
    assert _fails(*lost) == ["goodput at 5x overload"]


@pytest.mark.parametrize("watch", [BUSY, LATE, PAUSED])
def test_times_are_void_when_the_clients_lag_or_the_machine_stood_still(watch: Watch) -> None:
    verdicts = judge_overload([10.0], [8.9], [_answer()], [QUIET, watch])
    verdicts.append(judge_pace([_answer()], [_answer()], [watch]))
    assert {verdict.outcome for verdict in verdicts} == {Outcome.VOID}


def test_streams_that_slow_down_beside_slow_readers_are_seen() -> None:
    slow = replace(_answer(), message_s=[1.0, 11.0])
    assert _fails(judge_pace([_answer()], [slow], [QUIET]))
    assert not _fails(judge_pace([_answer()], [_answer()], [QUIET]))


@pytest.mark.parametrize(
    "leak",
    [
        {"num_fds": 20},
        {"num_tasks": 26},
        {"num_pages_held": 1},
        {"num_requests": 1},
        {"num_compiles": 1},
    ],
)
def test_each_leak_is_seen(leak: dict[str, int]) -> None:
    assert not _fails(*judge_rest("it", REST, REST))
    assert len(_fails(*judge_rest("it", REST, replace(REST, **leak)))) == 1


def test_memory_that_grows_after_the_first_quarter_fails() -> None:
    def samples(growth_bytes_per_s: int) -> list[Sample]:
        start = [Sample(float(at_s), at_s * 50 * MIB, 1, 1) for at_s in range(10)]
        grown = [
            Sample(at_s, 500 * MIB + at_s * growth_bytes_per_s, 1, 1) for at_s in range(10, 60)
        ]
        return start + grown

    assert not _fails(judge_memory("it", samples(MIB // 4)))
    assert _fails(judge_memory("it", samples(MIB)))


@pytest.mark.parametrize(
    "line", ["Traceback (most recent call last):", "ERROR jaxserve.x: y", "E1127 12:00:00 x.cc] z"]
)
def test_errors_in_the_log_are_seen(line: str) -> None:
    assert _fails(judge_log(f"starting\n{line}\n"))
    assert not _fails(judge_log("starting\nWARNING jaxserve.x: y\n"))


def test_the_exit_code_is_that_of_the_worst() -> None:
    verdicts = [Verdict("a", "", "", outcome) for outcome in Outcome]
    assert worst(verdicts) == 1
    assert worst([one for one in verdicts if one.outcome is not Outcome.FAILS]) == 3
    assert worst([Verdict("a", "", "", Outcome.HOLDS)]) == 0


@pytest.mark.parametrize("total_s", [600.0, 7200.0])
def test_slow_readers_read_nothing_for_a_minute(total_s: float) -> None:
    schedule = Schedule.of(total_s)
    assert schedule.pace_s == 60.0
    assert schedule.total_s == pytest.approx(total_s)
