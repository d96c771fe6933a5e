"""What a band says, and what came out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

from jaxserve.simulator.capacity import confidence_interval


@dataclass(frozen=True, slots=True)
class Finding:
    """One quantity of a band."""

    band: str
    quantity: str
    values: tuple[float, ...]
    """One a seed."""
    low: float
    high: float
    """Without limits, nothing is published to hold the value against."""

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def holds(self) -> bool:
        return self.low <= self.value <= self.high

    def line(self) -> str:
        each = ", ".join(f"{value:.4g}" for value in self.values)
        interval = confidence_interval(self.values)
        ci = "" if interval is None else f" [{interval[0]:.3g}, {interval[1]:.3g}]"
        high = "" if math.isinf(self.high) else f"{self.high:g}"
        verdict = "holds" if self.holds else "MISSES"
        limits = f"band {self.low:g}..{high}  {verdict}"
        if math.isinf(self.low) and math.isinf(self.high):
            limits = "no band"
        return f"{self.band:4} {self.quantity:52} {self.value:8.4g}  ({each}){ci}  {limits}"


@dataclass(frozen=True, slots=True)
class Settings:
    seeds: tuple[int, ...]
    num_requests: int
    clip: float | None
    pool: ProcessPoolExecutor

    def each_seed(self, function: Callable[[int], float]) -> tuple[float, ...]:
        return tuple(self.pool.map(function, self.seeds))
