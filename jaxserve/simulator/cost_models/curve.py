"""A measured curve: straight lines between knots."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise


class Curve:
    """y over x through knots of ascending x.

    Level before the first knot. Beyond the last one it goes on with the slope
    of the upper half of the range, whose ends are too far apart for noise.
    """

    def __init__(self, knots: Sequence[tuple[float, float]]) -> None:
        if len(knots) < 2 or any(b[0] <= a[0] for a, b in pairwise(knots)):
            raise ValueError("a curve needs two or more knots of ascending x")
        self._xs = [float(x) for x, _ in knots]
        self._ys = [float(y) for _, y in knots]
        last_x, last_y = self._xs[-1], self._ys[-1]
        first = min(bisect_left(self._xs, last_x / 2), len(self._xs) - 2)
        self._slope = (last_y - self._ys[first]) / (last_x - self._xs[first])

    def __call__(self, x: float) -> float:
        xs, ys = self._xs, self._ys
        if x >= xs[-1]:
            return ys[-1] + self._slope * (x - xs[-1])
        index = bisect_left(xs, x)
        if index == 0:
            return ys[0]
        x0, x1 = xs[index - 1], xs[index]
        return ys[index - 1] + (ys[index] - ys[index - 1]) * (x - x0) / (x1 - x0)


def thinned(knots: Sequence[tuple[float, float]], tolerance: float) -> list[tuple[float, float]]:
    """The fewest knots, taken greedily from the left, whose curve stays within
    `tolerance` (relative) of every given knot."""
    kept = [knots[0]]
    start = 0
    while start < len(knots) - 1:
        end = start + 1
        for candidate in range(start + 2, len(knots)):
            if _fits(knots, start, candidate, tolerance):
                end = candidate
            elif candidate - end > 64:
                break
        kept.append(knots[end])
        start = end
    return kept


def _fits(knots: Sequence[tuple[float, float]], start: int, end: int, tolerance: float) -> bool:
    (x0, y0), (x1, y1) = knots[start], knots[end]
    slope = (y1 - y0) / (x1 - x0)
    return all(abs(y0 + slope * (x - x0) - y) <= tolerance * y for x, y in knots[start + 1 : end])
