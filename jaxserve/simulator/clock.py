"""Virtual time: it moves only when somebody waits."""

from __future__ import annotations


class VirtualClock:
    """Seconds since the simulation began; called like `time.monotonic`."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance_to(self, time_s: float) -> None:
        """Moves on to `time_s`; a time in the past changes nothing."""
        self.now_s = max(self.now_s, time_s)
