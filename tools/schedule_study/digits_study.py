"""The evidence on images: test loss of the schedules, and how exploring changes sharpness."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import optax
from scipy import stats

import schedules
from tools.schedule_study.digits import digits
from tools.schedule_study.fixed_runs import Runs, train_side_by_side
from tools.schedule_study.plan import KINDS, rate_of, tuned_peak
from tools.schedule_study.sharpness import sharpness
from tools.schedule_study.task import Task


@dataclass(frozen=True)
class DigitsPlan:
    """What is run.

    Attributes:
        num_steps: Updates of each run.
        peaks: The grid that each schedule's peak is tuned on.
        tuning_seeds: Used for that and for nothing else.
        seeds: Of all results.
        explore_fractions: Of Knee, at its tuned peak.
    """

    num_steps: int = 1200
    peaks: tuple[float, ...] = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
    tuning_seeds: tuple[int, ...] = (100, 101, 102, 103, 104)
    seeds: tuple[int, ...] = tuple(range(30))
    explore_fractions: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)


@cache
def momentum() -> optax.GradientTransformation:
    """SGD with momentum 0.9 at a rate of 1, as in the paper's image tasks."""
    return optax.chain(optax.trace(decay=0.9), optax.scale(-1.0))


def run_digits_study(plan: DigitsPlan, pool: Executor) -> dict[str, Any]:
    """All runs on the digits, without a warm-up.

    Returns:
        Values for JSON: "schedules" (kind -> the tuning's losses by peak, the peak, test losses
        by seed), "num_tuning_runs", "explore" (fraction -> test loss, train loss and sharpness
        by seed) and "correlations" of fraction and sharpness.
    """
    by_kind = list(pool.map(partial(_tuned_schedule, plan), KINDS))
    found = dict(zip(KINDS, by_kind, strict=True))
    explored = pool.map(partial(_explored, plan, found["knee"]["peak"]), plan.explore_fractions)
    names = [f"{fraction:g}" for fraction in plan.explore_fractions]
    explore = dict(zip(names, explored, strict=True))
    return {
        "plan": asdict(plan),
        "schedules": found,
        "num_tuning_runs": sum(
            len(kind["tuning"]) * len(plan.tuning_seeds) for kind in found.values()
        ),
        "explore": explore,
        "correlations": _correlations(explore),
    }


def _tuned_schedule(plan: DigitsPlan, kind: schedules.Kind) -> dict[str, Any]:
    """The best peak of the grid, and the test losses with it on other seeds."""
    task = digits()

    def losses_at(peak: float) -> list[float]:
        rate = rate_of(kind, peak, plan.num_steps, 0)
        runs = _train(task, plan, [rate] * len(plan.tuning_seeds), plan.tuning_seeds)
        return [float(loss) for loss in runs.held_out_losses]

    peak, tuning = tuned_peak(plan.peaks, losses_at)
    rate = rate_of(kind, peak, plan.num_steps, 0)
    runs = _train(task, plan, [rate] * len(plan.seeds), plan.seeds)
    test_losses = [float(loss) for loss in runs.held_out_losses]
    return {"tuning": tuning, "peak": peak, "test_losses": test_losses}


def _train(
    task: Task, plan: DigitsPlan, rates: Sequence[optax.Schedule], seeds: Sequence[int]
) -> Runs:
    return train_side_by_side(task, momentum(), rates, seeds, plan.num_steps)


def _explored(plan: DigitsPlan, peak: float, fraction: float) -> dict[str, list[float]]:
    task = digits()
    rate = schedules.knee(peak, plan.num_steps, explore_fraction=fraction)
    runs = _train(task, plan, [rate] * len(plan.seeds), plan.seeds)
    # One run after the other: batched products are slower on the CPU.
    measure = jax.jit(partial(jax.lax.map, partial(sharpness, task)))
    train_loss = jax.jit(partial(jax.lax.map, lambda params: task.loss(params, task.train_set)))
    return {
        "test_loss": [float(loss) for loss in runs.held_out_losses],
        "train_loss": [float(loss) for loss in np.asarray(train_loss(runs.params))],
        "sharpness": [float(value) for value in np.asarray(measure(runs.params))],
    }


def _correlations(explore: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Spearman's, of the explored fraction with sharpness and with test loss.

    With and without the runs that never decay: those have not converged.
    """
    found = {}
    for name, fractions in {
        "all": list(explore),
        "decayed": [fraction for fraction in explore if float(fraction) < 1],
    }.items():
        for measure in ("sharpness", "test_loss"):
            pairs = [(float(f), value) for f in fractions for value in explore[f][measure]]
            found[f"{measure}, {name}"] = _spearman(pairs)
    return found


def _spearman(pairs: list[tuple[float, float]]) -> dict[str, float]:
    """Coefficient and 95 % interval by Fisher's transformation (Bonett and Wright's variance)."""
    rho = float(stats.spearmanr(*zip(*pairs, strict=True)).statistic)
    half = 1.96 * ((1 + rho**2 / 2) / (len(pairs) - 3)) ** 0.5
    low, high = np.tanh([np.arctanh(rho) - half, np.arctanh(rho) + half])
    return {"rho": rho, "low": float(low), "high": float(high), "num_runs": len(pairs)}
