"""A ladder of rates: how many rungs one contender holds more than another."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

MAX_RUNGS = 12


@dataclass(frozen=True, slots=True)
class Ladder:
    """Rung n is `factor` ** n times the rate of rung 0.

    A contender that meets the objective at a rung is taken to meet it below, and one that
    misses it at a rung to miss it above.
    """

    factor: float

    def rungs(self, ratio: float) -> int:
        """The fewest that make that ratio."""
        return math.ceil(math.log(ratio, self.factor))

    def gain(
        self, ours: Callable[[int], bool], rival: Callable[[int], bool], start: int, ratio: float
    ) -> tuple[int, bool]:
        """How many rungs ours is above the rival's, and whether it may be more.

        First it is asked whether ours holds `ratio` times a rate that the rival does not hold;
        if so, how much more is not asked, since a rung takes long. Otherwise both are searched.

        Args:
            start: where the rival begins.

        Raises ValueError if a contender's rung is not found within `MAX_RUNGS`.
        """
        failing = _climb(rival, start)
        enough = self.rungs(ratio)
        if ours(failing + enough):
            return enough, True
        held = failing - 1 if failing > start else _descend(rival, failing - 1)
        return _descend(ours, failing + enough - 1) - held, False


def _climb(meets: Callable[[int], bool], rung: int) -> int:
    """The first rung from here that is missed."""
    for tried in range(rung, rung + MAX_RUNGS):
        if not meets(tried):
            return tried
    raise ValueError(f"{MAX_RUNGS} rungs from {rung} upwards are all held: begin higher")


def _descend(meets: Callable[[int], bool], rung: int) -> int:
    """The first rung from here downwards that is met."""
    for tried in range(rung, rung - MAX_RUNGS, -1):
        if meets(tried):
            return tried
    raise ValueError(f"{MAX_RUNGS} rungs from {rung} downwards are all missed: begin lower")
