"""Slow processes: finds a better sharing of the logical shards from the times that trainers
measure. No bit depends on it."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence

from jaxserve.trainer.config import PlacementSection, TrainConfig
from jaxserve.trainer.world import share_shards

WINDOW_STEPS = 5
NUM_WARM_UP_STEPS = 2
"""The first steps compile."""
Speeds = tuple[float, ...]
"""Logical shards a second of one device of each process."""


class Balance:
    """Watches one generation.

    Args:
        num_shards: logical shards of the run.
        placement: who computes.
        speeds: what the generation's shares follow from; None: equal shares.
        gain: how much faster steps must become, as a factor.
        after_s: for how long that must have been so.
    """

    def __init__(
        self,
        num_shards: int,
        placement: PlacementSection,
        speeds: Speeds | None,
        gain: float,
        after_s: float,
    ) -> None:
        self._num_shards = num_shards
        self._placement = placement
        self._gain = gain
        self._after_s = after_s
        self._shares = self._shares_of(speeds or (1.0,) * placement.processes)
        self._times_s: list[deque[float]] = [
            deque(maxlen=WINDOW_STEPS) for _ in range(placement.processes)
        ]
        self._num_steps = 0
        self._since_s: float | None = None

    @classmethod
    def of(
        cls, config: TrainConfig, placement: PlacementSection, speeds: Speeds | None
    ) -> Balance | None:
        """As the config says; None: shares stay as they are."""
        gain = config.supervision.rebalance_gain
        if gain is None or placement.processes == 1 or config.numerics.mode != "exact":
            return None
        after_s = config.supervision.rebalance_after_s
        return cls(config.batch.num_logical_shards, placement, speeds, gain, after_s)

    def step(self, computed_s: Sequence[float], now_s: float) -> Speeds | None:
        """A step is done.

        Args:
            computed_s: how long each process's own gradients took; 0: not known.
            now_s: monotonic seconds.

        Returns:
            The speeds that the shards are to be shared by anew, or None.
        """
        self._num_steps += 1
        if self._num_steps <= NUM_WARM_UP_STEPS or not all(computed_s):
            return None
        for times, seconds in zip(self._times_s, computed_s, strict=True):
            times.append(seconds)
        medians = [statistics.median(times) for times in self._times_s]
        speeds = tuple(share / one for share, one in zip(self._shares, medians, strict=True))
        better = self._shares_of(speeds)
        best_s = max(share / speed for share, speed in zip(better, speeds, strict=True))
        if max(medians) < self._gain * best_s:
            self._since_s = None
        elif self._since_s is None:
            self._since_s = now_s
        if self._since_s is None or len(self._times_s[0]) < WINDOW_STEPS:
            return None
        return speeds if now_s - self._since_s >= self._after_s else None

    def _shares_of(self, speeds: Speeds) -> list[int]:
        """Of each process the largest share of one of its devices."""
        each = self._placement.devices_per_process
        ranges = share_shards(self._num_shards, [one for one in speeds for _ in range(each)])
        return [
            max(len(part) for part in ranges[rank * each : (rank + 1) * each])
            for rank in range(self._placement.processes)
        ]
