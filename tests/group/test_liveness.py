"""Which process is blamed, and when: signs in, verdict out."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jaxserve.engine.group.liveness import (
    BEAT_S,
    FAILURE_GRACE_S,
    START_LIMIT_S,
    AwakeClock,
    Liveness,
    Signs,
)

LIMIT_S = 10.0


def followers(count: int = 2, *, at_s: float = 0.0, finished: int = 0) -> list[Signs]:
    return [
        Signs(number, f"host{number}, pid {number}00", at_s, finished, finished)
        for number in range(1, count + 1)
    ]


@pytest.fixture
def liveness() -> Liveness:
    judge = Liveness(LIMIT_S, 0.0)
    judge.is_starting = False
    return judge


def test_idle_followers_that_beat_are_never_lost(liveness: Liveness) -> None:
    for second in range(1000):
        assert liveness.find_loss(followers(at_s=second), 0, second) is None


def test_a_dead_process_is_named_at_once(liveness: Liveness) -> None:
    signs = followers(finished=7)
    signs[1] = replace(signs[1], ended="was ended by SIGKILL (out of memory?)")
    loss = liveness.find_loss(signs, 7, 0.1)
    assert loss is not None
    assert loss.process_id == 2
    assert "process 2 (host2, pid 200) was ended by SIGKILL" in loss.message
    assert "the last step that it finished is 7" in loss.message


def test_silence_counts_from_the_last_sign(liveness: Liveness) -> None:
    signs = [replace(followers()[0], heard_s=20.0), replace(followers()[1], heard_s=15.0)]
    assert liveness.find_loss(signs, 0, 15.0 + LIMIT_S) is None
    loss = liveness.find_loss(signs, 0, 15.1 + LIMIT_S)
    assert loss is not None
    assert loss.process_id == 2
    assert "no sign of life for 10 s" in loss.message


def test_a_starting_group_has_more_patience() -> None:
    liveness = Liveness(LIMIT_S, 0.0)
    assert liveness.find_loss(followers(), 0, START_LIMIT_S) is None
    assert liveness.find_loss(followers(), 0, START_LIMIT_S + 0.1) is not None


def test_who_fails_because_another_died_is_not_blamed(liveness: Liveness) -> None:
    """Process 1 reports a broken collective and ends, just before the end of process 2 is seen."""
    first, second = followers()
    first = replace(first, failure="XlaRuntimeError", failed_s=0.0, ended="ended with exit code 1")
    assert liveness.find_loss([first, second], 1, FAILURE_GRACE_S) is None
    loss = liveness.find_loss([first, replace(second, ended="was ended by SIGKILL")], 1, 0.5)
    assert loss is not None
    assert loss.process_id == 2


def test_who_fails_alone_is_blamed_after_the_grace(liveness: Liveness) -> None:
    first, second = followers()
    first = replace(first, failure="RuntimeError", failed_s=0.0)
    loss = liveness.find_loss([first, second], 1, FAILURE_GRACE_S + 0.1)
    assert loss is not None
    assert (loss.process_id, "failed: RuntimeError" in loss.message) == (1, True)


def _run_steps(liveness: Liveness, count: int, step_s: float) -> float:
    now_s = 0.0
    for number in range(1, count + 1):
        assert liveness.find_loss(followers(at_s=now_s, finished=number - 1), number, now_s) is None
        now_s += step_s
        assert liveness.find_loss(followers(at_s=now_s, finished=number), number, now_s) is None
    return now_s


def test_a_step_that_does_not_end_names_who_has_not_begun_it(liveness: Liveness) -> None:
    now_s = _run_steps(liveness, 5, 0.2)

    def signs(at_s: float) -> list[Signs]:
        first, second = followers(at_s=at_s, finished=5)
        return [replace(first, begun=6), second]

    assert liveness.find_loss(signs(now_s), 6, now_s) is None
    assert liveness.find_loss(signs(now_s + LIMIT_S), 6, now_s + LIMIT_S) is None
    loss = liveness.find_loss(signs(now_s + LIMIT_S + 1), 6, now_s + LIMIT_S + 1)
    assert loss is not None
    assert loss.process_id == 2
    assert "come to the end of no step for 11 s" in loss.message


def test_slow_steps_are_no_loss(liveness: Liveness) -> None:
    now_s = _run_steps(liveness, 5, 4.0)
    later_s = now_s + 35.0
    assert liveness.find_loss(followers(at_s=later_s, finished=5), 6, later_s) is None
    later_s = now_s + 45.0
    assert liveness.find_loss(followers(at_s=later_s, finished=5), 6, later_s) is not None


def test_a_process_that_has_fallen_silent_is_waited_for_before_others_are_blamed(
    liveness: Liveness,
) -> None:
    """A stopped process stalls the step of all: its silence tells more than their steps do."""
    now_s = _run_steps(liveness, 5, 0.2)
    stopped = replace(followers(finished=5)[1], heard_s=now_s + BEAT_S, begun=6)
    for tenth in range(1, 105):
        at_s = now_s + tenth / 10
        first = replace(followers(at_s=at_s, finished=5)[0], begun=5)
        assert liveness.find_loss([first, stopped], 6, at_s) is None
    loss = liveness.find_loss([first, stopped], 6, now_s + BEAT_S + LIMIT_S + 0.1)
    assert loss is not None
    assert (loss.process_id, "no sign of life" in loss.message) == (2, True)


def test_an_idle_hour_is_no_part_of_the_next_step(liveness: Liveness) -> None:
    _run_steps(liveness, 5, 0.2)
    assert liveness.find_loss(followers(at_s=3600, finished=5), 5, 3600.0) is None
    assert liveness.find_loss(followers(at_s=3601, finished=5), 6, 3601.0) is None


def test_a_pause_of_the_listener_is_nobodys_silence() -> None:
    clock = AwakeClock(100.0)
    assert clock.tick(100.1) == pytest.approx(0.1)
    assert clock.tick(400.0) < 1.0
    assert clock.tick(400.1) == pytest.approx(clock.now_s)
