"""Score: a share of right answers, and how far chance may have moved it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Score:
    num_right: int
    num_items: int

    @classmethod
    def of(cls, verdicts: Sequence[bool]) -> Score:
        return cls(sum(verdicts), len(verdicts))

    @property
    def accuracy(self) -> float:
        return self.num_right / self.num_items

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %: Wilson's (1927), which holds for few items and shares near 0 or 1 too."""
        z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
        n, share = self.num_items, self.accuracy
        centre = (share + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)
