"""Liveness: from signs of life to which process the group has lost. No sockets, no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxserve.watchdog import Watchdog

TICK_S = 0.1
"""How often signs are looked at."""
BEAT_S = 0.5
"""How often a process says that it is there."""
MISSED_BEATS = 4
"""A process that has missed so many is under suspicion."""
START_LIMIT_S = 60.0
"""Of silence and of the first step while the group starts: importing and compiling can keep a
process from answering, and the first step connects the devices."""
FAILURE_GRACE_S = 1.0
"""When one process dies, collectives fail in all. Who failed so is named only if nobody has died
within this time."""
JAX_HEARTBEAT_TIMEOUT_S = 24 * 3600
"""JAX's own watch over the processes stays out of it: it takes a pause of the whole machine for
the death of all."""
_MAX_TICK_S = 5 * TICK_S


class AwakeClock:
    """Seconds for which this process could listen: a pause of its own is nobody's silence.

    If the whole machine stands still, all of its processes fall silent for one another.
    """

    def __init__(self, monotonic_s: float) -> None:
        self._last_s = monotonic_s
        self.now_s = 0.0

    def tick(self, monotonic_s: float) -> float:
        """The time on this clock; to be called every `TICK_S`."""
        self.now_s += min(monotonic_s - self._last_s, _MAX_TICK_S)
        self._last_s = monotonic_s
        return self.now_s


@dataclass(frozen=True, slots=True)
class Signs:
    """What is known of a follower. Times are an `AwakeClock`'s."""

    process_id: int
    where: str
    """Its host and process number, for people."""
    heard_s: float
    begun: int = 0
    """Number of the program that it began last."""
    finished: int = 0
    """Number of the step that it finished last."""
    ended: str | None = None
    """How its process or its connection ended."""
    failure: str | None = None
    """What it said before it gave up."""
    failed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Loss:
    """A process without which the group can do no more."""

    process_id: int
    message: str
    """For clients and logs: which process, what became of it, how far it got."""


class Liveness:
    """Judges the followers of one leader."""

    def __init__(self, timeout_s: float, now_s: float) -> None:
        self._timeout_s = timeout_s
        self._steps = Watchdog(timeout_s, max(timeout_s, START_LIMIT_S), now_s)
        self._num_finished = 0
        self._progress_s = now_s
        self.is_starting = True
        """Until the group is ready."""

    @property
    def silence_limit_s(self) -> float:
        """Seconds without a sign that are too long."""
        return max(self._timeout_s, START_LIMIT_S) if self.is_starting else self._timeout_s

    def find_loss(self, followers: Sequence[Signs], last_step: int, now_s: float) -> Loss | None:
        """The process to blame, if one is lost.

        Args:
            followers: their signs.
            last_step: number of the step sent last; 0 before the first one.
            now_s: on the clock of the signs.
        """
        self._note_progress(followers, last_step, now_s)
        for one in followers:
            # One that said before why it ends is not the first one that was lost.
            if one.ended is not None and one.failure is None:
                return self._loss(one, one.ended)
        for one in followers:
            silent_s = now_s - one.heard_s
            if silent_s > self.silence_limit_s:
                return self._loss(one, f"has given no sign of life for {silent_s:.0f} s")
        for one in followers:
            if one.failure is not None and now_s - one.failed_s > FAILURE_GRACE_S:
                return self._loss(one, f"failed: {one.failure}")
        suspects = any(now_s - one.heard_s > MISSED_BEATS * BEAT_S for one in followers)
        if suspects or not self._steps.is_overdue(now_s, is_patient=False):
            return None
        return self._blame_slowest(followers, now_s)

    def _note_progress(self, followers: Sequence[Signs], last_step: int, now_s: float) -> None:
        num_finished = min((one.finished for one in followers), default=last_step)
        if num_finished > self._num_finished:
            self._steps.step(now_s - self._progress_s, now_s)
            self._num_finished, self._progress_s = num_finished, now_s
        elif num_finished == last_step:
            self._steps.reset(now_s)
            self._progress_s = now_s

    def _loss(self, one: Signs, what: str) -> Loss:
        message = f"process {one.process_id} ({one.where}) {what}"
        if not self.is_starting:
            message += (
                f"; the last step that it finished is {one.finished}. The model is spread over all "
                "processes and is served no more: restart the server"
            )
        return Loss(one.process_id, message)

    def _blame_slowest(self, followers: Sequence[Signs], now_s: float) -> Loss:
        """All answer, but a step does not end: whoever has not begun it holds the others up."""
        first = min(followers, key=lambda one: (one.begun, one.finished, one.process_id))
        seconds = self._steps.silence_s(now_s)
        return self._loss(first, f"answers but has come to the end of no step for {seconds:.0f} s")
