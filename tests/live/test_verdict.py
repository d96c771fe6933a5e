"""The judgement of live measurements: a busy machine never gives a pass."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from jaxserve.engine.request import RequestOutput, ServiceObjective, Usage
from jaxserve.simulator.run import SimRequest
from jaxserve.simulator.workloads import Lengths
from tools.policy_evaluation.open_loop import LiveRun
from tools.policy_evaluation.slack import attainment
from tools.policy_evaluation.streams import TokenLog
from tools.policy_evaluation.verdict import (
    MAX_FOREIGN_SHARE,
    MAX_SPREAD,
    Check,
    Noise,
    Outcome,
    cpu_times_s,
)

QUIET = Noise(MAX_SPREAD, MAX_FOREIGN_SHARE, 1.0)
UNSTEADY = Noise(MAX_SPREAD + 0.01, 0.0, 1.0)
BUSY = Noise(0.0, MAX_FOREIGN_SHARE + 0.01, 1.0)
HOLDS = Check("ratio", 1.0, 1.25)
MISSES = Check("ratio", 1.3, 1.25)


def test_a_check_has_a_side() -> None:
    assert Check("at the limit", 1.25, 1.25).holds
    assert not MISSES.holds
    assert Check("at least", 4.0, 4.0, at_most=False).holds
    assert not Check("at least", 3.9, 4.0, at_most=False).holds
    assert not Check("no number", float("nan"), 1.25).holds


@pytest.mark.parametrize("checks", [(HOLDS,), (MISSES,)])
def test_noise_voids_whatever_the_checks_say(checks: tuple[Check, ...]) -> None:
    assert Outcome("x", checks, {}, UNSTEADY).verdict == "void"
    busy = Outcome("x", checks, {}, BUSY)
    assert busy.verdict == "void"
    assert "other programs took 11%" in busy.values()["void_reasons"][0]
    assert Outcome("x", checks, {}, QUIET, ("the generator lagged",)).verdict == "void"


def test_a_quiet_machine_gives_a_verdict() -> None:
    assert Outcome("x", (HOLDS, HOLDS), {}, QUIET).verdict == "pass"
    assert Outcome("x", (HOLDS, MISSES), {}, QUIET).verdict == "fail"


def test_own_work_is_not_foreign() -> None:
    before = cpu_times_s()
    end_s = time.process_time() + 0.4  # However long that takes beside others.
    while time.process_time() < end_s:
        np.ones((200, 200)) @ np.ones((200, 200))
    machine_s, own_s = (now - then for now, then in zip(cpu_times_s(), before, strict=True))
    # /proc counts in hundredths of a second on each processor.
    assert own_s > 0.1
    assert machine_s >= own_s - 0.1


def output(name: str, num_tokens: int, *, last: bool = False) -> RequestOutput:
    usage = Usage(1, num_tokens, 0, 0.5, 1.0, 2.0) if last else None
    return RequestOutput(name, (1,) * num_tokens, "", usage=usage)


def test_gaps_lie_within_one_stream_and_the_window() -> None:
    log = TokenLog()
    log.token_s = {"a": [0.0, 1.0, 2.0, 5.0], "b": [1.5, 1.75, 9.0]}
    assert log.gaps_s(["a", "b"], 0.5, 6.0).tolist() == [1.0, 3.0, 0.25]


def test_a_log_wakes_who_waits_for_it() -> None:
    log = TokenLog()
    timer = threading.Timer(0.05, log.deliver, [[output("a", 1), output("b", 0)]])
    timer.start()
    log.wait_for_tokens(["a"], 1)
    assert list(log.token_s) == ["a"]  # An output without a token is no token.
    log.deliver([output("a", 1, last=True)])
    log.wait_finished(["a"])
    assert log.queue_s == {"a": 0.5}
    with pytest.raises(TimeoutError):
        log.wait_finished(["b"], timeout_s=0.01)


def test_every_token_has_its_deadline() -> None:
    """One that is ahead may spend its lead; one late token makes a request late."""
    requests = [SimRequest(Lengths(1, 3), 0.0, ServiceObjective(1.0, 0.1))] * 3
    token_s = [
        np.array([0.2, 1.05, 1.15]),
        np.array([0.2, 1.15, 1.16]),
        np.array([1.05, 1.06, 1.07]),
    ]
    run = LiveRun(token_s, np.zeros(3), np.zeros(3), 2.0)
    assert attainment(run, requests) == pytest.approx(1 / 3)
