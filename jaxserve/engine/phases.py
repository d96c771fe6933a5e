"""Phases: what start-up is doing, and how long each part took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter

OnPhase = Callable[[str, float], None]
"""Called with a phase's name and seconds when it ends."""


@dataclass(slots=True)
class Phases:
    """Seconds by name, in the order in which the phases ended."""

    on_phase: OnPhase | None
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time(self, name: str) -> Iterator[None]:
        """Times what runs inside."""
        start = perf_counter()
        yield
        self.record(name, perf_counter() - start)

    def record(self, name: str, seconds: float) -> None:
        """Notes a phase that was timed elsewhere."""
        self.seconds[name] = seconds
        if self.on_phase is not None:
            self.on_phase(name, seconds)
