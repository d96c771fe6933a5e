"""What the study runs on text: the report states it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import optax
from optax import contrib

import schedules
from tools.schedule_study.fixed_runs import CHUNK

MAX_WIDENINGS = 4
KINDS: tuple[schedules.Kind, ...] = ("cosine", "linear", "knee")


@dataclass(frozen=True)
class Plan:
    """Budgets, grids and seeds.

    Attributes:
        num_steps: T, the full budget.
        warmup_steps: Of every schedule but the tuned rates'.
        peaks: The grid that each schedule's peak is tuned on, at the full budget.
        tuning_seeds: Used for that and for nothing else.
        seeds: Of all results.
        budgets: Knee's shorter budgets at its tuned peak.
        equal_peaks: Peaks at which Knee and cosine are compared whatever their tuned ones are.
        equal_budgets: Knee's budgets at each of them.
        initial_rates: What the tuned rates start from.
        control_seeds: Of the negative controls.
    """

    num_steps: int = 3000
    warmup_steps: int = 100
    peaks: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
    tuning_seeds: tuple[int, ...] = (100, 101)
    seeds: tuple[int, ...] = (10, 11, 12, 13, 14)
    budgets: tuple[int, ...] = (2400, 2520, 2640, 2760, 2880)
    equal_peaks: tuple[float, ...] = (2e-3, 4e-3)
    equal_budgets: tuple[tuple[int, ...], ...] = (
        (1500, 1800, 2100, 2400),
        (2100, 2280, 2400, 2460, 2580),
    )
    initial_rates: tuple[float, ...] = (1e-5, 1e-4, 1e-3)
    control_seeds: tuple[int, ...] = (10, 11, 12)

    def __post_init__(self) -> None:
        lengths = (self.num_steps, *self.budgets, *(b for bs in self.equal_budgets for b in bs))
        if wrong := [length for length in lengths if length % CHUNK]:
            raise ValueError(f"budgets must be multiples of {CHUNK}, not {wrong}")
        if len(self.equal_peaks) != len(self.equal_budgets):
            raise ValueError("each of equal_peaks needs its equal_budgets")
        if set(self.tuning_seeds) & {*self.seeds, *self.control_seeds}:
            raise ValueError("the seeds of the tuning must not be among those of the results")


def tuned_peak(
    peaks: Sequence[float], search: Callable[[float], list[float]]
) -> tuple[float, dict[str, list[float]]]:
    """The peak of the lowest mean loss, and the losses of all that were tried.

    A best one at an end of the grid is not known to be best: the grid is widened.

    Args:
        peaks: The grid, rising, each twice the one before.
        search: Peak -> final losses by seed.
    """
    losses = {peak: search(peak) for peak in peaks}
    for _ in range(MAX_WIDENINGS):
        best = min(losses, key=lambda peak: statistics.fmean(losses[peak]))
        if min(losses) < best < max(losses):
            return best, {f"{peak:g}": losses[peak] for peak in sorted(losses)}
        wider = best / 2 if best == min(losses) else best * 2
        losses[wider] = search(wider)
    raise ValueError(f"no best peak between {min(losses):g} and {max(losses):g}")


@cache
def adam() -> optax.GradientTransformation:
    """Adam (0.9, 0.99) at a rate of 1."""
    return optax.chain(optax.scale_by_adam(b1=0.9, b2=0.99), optax.scale(-1.0))


def rate_of(kind: schedules.Kind, peak: float, num_steps: int, warmup_steps: int) -> optax.Schedule:
    """A schedule that ends at 0 after `num_steps`."""
    config = schedules.ScheduleConfig(
        kind=kind, peak_value=peak, total=num_steps, warmup=warmup_steps
    )
    return schedules.make_schedule(config)


COMPARATORS: dict[str, Callable[[optax.Schedule], optax.GradientTransformation]] = {
    "prodigy": contrib.prodigy,
    "mechanize": lambda rate: contrib.mechanize(optax.adam(rate, b1=0.9, b2=0.99)),
    "momo_adam": lambda rate: contrib.momo_adam(rate, b1=0.9, b2=0.99),
}
"""Optimizers that choose their rate, around a given shape."""
COMPARATOR_PEAKS = {"prodigy": 1.0, "mechanize": 1.0, "momo_adam": 1e-2}
"""Peaks of that shape, as their documentation gives them: no search."""
