"""The progress watchdog: independent of heartbeats, since what is alive may be stuck."""

from __future__ import annotations

import statistics
from collections import deque

MEDIAN_FACTOR = 10
WINDOW_STEPS = 64


class Watchdog:
    """Knows how long a generation may go without progress."""

    def __init__(self, limit_s: float, start_limit_s: float, now_s: float) -> None:
        """
        Args:
            limit_s: least limit after the first step.
            start_limit_s: limit until then, and while there is reason to wait.
            now_s: monotonic seconds.
        """
        self._limit_s = limit_s
        self._start_limit_s = start_limit_s
        self._last_s = now_s
        self._seconds: deque[float] = deque(maxlen=WINDOW_STEPS)

    def step(self, seconds: float, now_s: float) -> None:
        """A step has been computed in `seconds`."""
        self._seconds.append(seconds)
        self._last_s = now_s

    def reset(self, now_s: float) -> None:
        """Something else has gone on."""
        self._last_s = now_s

    def limit_s(self, *, is_patient: bool) -> float:
        """Seconds without progress that are too long.

        Args:
            is_patient: something slow, such as an evaluation, is under way.
        """
        if is_patient or not self._seconds:
            return self._start_limit_s
        steady = list(self._seconds)[1:]  # The first step of a generation compiles.
        return max(self._limit_s, MEDIAN_FACTOR * statistics.median(steady) if steady else 0.0)

    def is_overdue(self, now_s: float, *, is_patient: bool) -> bool:
        """Whether the generation is to be given up."""
        return now_s - self._last_s > self.limit_s(is_patient=is_patient)

    def silence_s(self, now_s: float) -> float:
        """Seconds since the last progress."""
        return now_s - self._last_s
