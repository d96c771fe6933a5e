"""Means with their uncertainty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Mean:
    """Mean of independent values and its 95 % interval (Student's t)."""

    mean: float
    low: float
    high: float
    num_values: int

    def text(self, digits: int = 4) -> str:
        """As in a table."""
        half = 0.5 * (self.high - self.low)
        return f"{self.mean:.{digits}f} ± {half:.{digits}f}"


def mean_of(values: Sequence[float] | np.ndarray) -> Mean:
    """Of two or more values."""
    numbers = np.asarray(values, np.float64)
    mean = float(numbers.mean())
    quantile = float(stats.t.ppf(0.975, len(numbers) - 1))
    half = quantile * float(numbers.std(ddof=1)) / len(numbers) ** 0.5
    return Mean(mean, mean - half, mean + half, len(values))


def paired(values: Sequence[float] | np.ndarray, others: Sequence[float] | np.ndarray) -> Mean:
    """Of the differences, where both have the same seeds in the same order."""
    return mean_of(np.subtract(values, others, dtype=np.float64))


def steps_to_reach(
    targets: np.ndarray, losses_by_budget: Mapping[int, np.ndarray], num_resamples: int = 4000
) -> Mean:
    """The budget at which a schedule's mean final loss equals the mean of `targets`.

    Between budgets the loss is interpolated linearly. The 95 % interval is a
    bootstrap over seeds, which targets and losses share.

    Args:
        targets: float[seeds].
        losses_by_budget: Steps -> float[seeds].

    Returns:
        The steps; the shortest or longest budget where the target lies beyond.
    """
    budgets = np.asarray(sorted(losses_by_budget))
    losses = np.stack([losses_by_budget[budget] for budget in budgets])
    picks = np.random.default_rng(0).integers(len(targets), size=(num_resamples, len(targets)))
    resampled = [
        _crossing(budgets, losses[:, pick].mean(axis=1), targets[pick].mean()) for pick in picks
    ]
    low, high = np.quantile(resampled, [0.025, 0.975])
    point = _crossing(budgets, losses.mean(1), targets.mean())
    return Mean(point, float(low), float(high), len(targets))


def _crossing(budgets: np.ndarray, losses: np.ndarray, target: float) -> float:
    """Losses fall with the budget but for noise: their running minimum is what was reached."""
    reached = np.minimum.accumulate(losses)
    return float(np.interp(-target, -reached, budgets))
