"""MemoryRecovery: what becomes of an engine whose device had no memory for a step.

The shapes of steps are fixed and their memory was planned before READY, so it is another program
on the device, or the host, that took what was free. A failed step may have taken the KV pool along,
which it was to update in place. So everything on the device but the weights is made anew, and
running requests are computed again, by the way of a preemption, to the same tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from jaxserve.engine.executor import StepOutOfMemory
from jaxserve.engine.request import Request
from jaxserve.errors import OutOfMemory

logger = logging.getLogger(__name__)

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 2.0
MAX_RESTARTS = 6
"""Attempts in a row to get memory for the pool, about 5 s in all; then the engine has failed."""


class LosesSteps(Protocol):
    """A scheduler."""

    def lose_steps(self) -> Sequence[Request]: ...


class Restartable(Protocol):
    """An executor."""

    def restart(self) -> None: ...


class MemoryRecovery:
    """Called by the loop's thread; the figures may be read by any.

    The first failure ends no request. Each further one, with no whole step in between, ends the
    younger half of those that ran at any of them.

    Args:
        scheduler, executor: of one engine.
        pause: for memory to become free; takes seconds.
    """

    def __init__(
        self,
        scheduler: LosesSteps,
        executor: Restartable,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._pause = pause
        self.num_failures = 0
        """Steps that found no memory, since the start."""
        self.num_in_a_row = 0
        """Of these, since the last whole step, or since nobody was left."""
        self._affected: list[Request] = []
        """Those that ran at one of these."""

    def note_step(self) -> None:
        """A step came to its end: failures are counted anew."""
        self.num_in_a_row = 0
        self._affected = []

    def recover(self) -> list[Request]:
        """Makes the scheduler and the executor ready for the next plan.

        Returns the requests to be ended, whose `failure` says why. Raises StepOutOfMemory if there
        is no memory for the pool either.
        """
        self.num_failures += 1
        self.num_in_a_row += 1
        affected = {*self._affected, *self._scheduler.lose_steps()}
        unfinished = [request for request in affected if request.finish_reason is None]
        unfinished.sort(key=lambda request: request.arrival_s)
        num_kept = len(unfinished) // (1 if self.num_in_a_row == 1 else 2)
        self._affected, victims = unfinished[:num_kept], unfinished[num_kept:]
        logger.error(
            "the device had no memory for a step (%d in a row): %d requests are computed again, "
            "%d end",
            self.num_in_a_row,
            num_kept,
            len(victims),
        )
        for request in victims:
            request.failure = OutOfMemory(
                "the server's device ran out of memory: try again later, or another server"
            )
        if self.num_in_a_row > 1:
            self._pause(_pause_s(self.num_in_a_row - 2))
        self._restart()
        if not self._affected:
            self.note_step()  # Whoever comes next is as good as the first.
        return victims

    def _restart(self) -> None:
        for attempt in range(MAX_RESTARTS):
            try:
                self._executor.restart()
            except StepOutOfMemory:
                if attempt == MAX_RESTARTS - 1:
                    raise
                self._pause(_pause_s(attempt))
            else:
                return


def _pause_s(index: int) -> float:
    return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**index)
