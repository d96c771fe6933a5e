"""The evidence on text: Knee against tuned baselines, and rates that need no search."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

import schedules
from tools.schedule_study.char_lm import char_lm
from tools.schedule_study.corpus import read_corpus
from tools.schedule_study.fixed_runs import train_side_by_side
from tools.schedule_study.plan import (
    COMPARATOR_PEAKS,
    COMPARATORS,
    KINDS,
    Plan,
    adam,
    rate_of,
    tuned_peak,
)
from tools.schedule_study.task import Task
from tools.schedule_study.tuned_runs import TunedRuns


@dataclass(frozen=True)
class Fixed:
    """Runs of one schedule: every peak with every seed."""

    label: str
    kind: schedules.Kind
    peaks: tuple[float, ...]
    num_steps: int
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Compared:
    """Runs of an optimizer that chooses its rate."""

    label: str
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Tuned:
    """Runs of `lr_tuner`."""

    label: str
    variant: schedules.Variant
    initial_lr: float
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class Search:
    """The tuning of one schedule's peak."""

    kind: schedules.Kind


Job = Fixed | Compared | Tuned


@dataclass(frozen=True)
class Work:
    """A job with all that a process of its own needs for it."""

    text: Path
    plan: Plan
    job: Job | Search


def run_char_study(text: Path, plan: Plan, pool: Executor) -> dict[str, Any]:
    """All runs on the corpus at `text`.

    Returns:
        Values for JSON: "tuning" (kind -> peak -> losses by seed), "peaks" (the tuned ones),
        "num_tuning_runs", and "runs": label -> list of runs, each with at least a held_out_loss.
    """
    works = [Work(text, plan, Search(kind)) for kind in KINDS]
    found = dict(zip(KINDS, pool.map(run_search, works), strict=True))
    peaks = {kind: peak for kind, (peak, _) in found.items()}
    tuning = {kind: losses for kind, (_, losses) in found.items()}
    jobs = _jobs(plan, peaks)
    results = _run(jobs, text, plan, pool)
    return {
        "plan": asdict(plan),
        "tuning": tuning,
        "peaks": peaks,
        "num_tuning_runs": sum(map(len, (runs for by in tuning.values() for runs in by.values()))),
        "runs": {job.label: runs for job, runs in zip(jobs, results, strict=True)},
    }


def _jobs(plan: Plan, peaks: Mapping[schedules.Kind, float]) -> list[Job]:
    whole, seeds = plan.num_steps, plan.seeds
    jobs: list[Job] = [
        Tuned(f"{variant} from {rate:g}", variant, rate, seeds if variant == "auto" else controls)
        for controls in (plan.control_seeds,)
        for variant in ("auto", "greedy", "running_max")
        for rate in plan.initial_rates
    ]
    jobs += [Compared(name, seeds) for name in COMPARATORS]
    jobs += [Fixed(f"{kind} {whole}", kind, (peaks[kind],), whole, seeds) for kind in KINDS]
    jobs += [
        Fixed(f"knee {budget}", "knee", (peaks["knee"],), budget, seeds) for budget in plan.budgets
    ]
    for peak, budgets in zip(plan.equal_peaks, plan.equal_budgets, strict=True):
        jobs.append(Fixed(f"cosine at {peak:g} {whole}", "cosine", (peak,), whole, seeds))
        jobs += [
            Fixed(f"knee at {peak:g} {budget}", "knee", (peak,), budget, seeds)
            for budget in (*budgets, whole)
        ]
    return jobs


def _run(jobs: Sequence[Job], text: Path, plan: Plan, pool: Executor) -> list[list[dict[str, Any]]]:
    return list(pool.map(run_work, [Work(text, plan, job) for job in jobs]))


def run_work(work: Work) -> list[dict[str, Any]]:
    """One dict a run; called in a process of its own."""
    task, job = _task(work.text), work.job
    if isinstance(job, Fixed):
        return _fixed(task, work.plan, job)
    if isinstance(job, Compared):
        return _compared(task, work.plan, job)
    assert isinstance(job, Tuned)
    return _tuned(task, work.plan, job)


def run_search(work: Work) -> tuple[float, dict[str, list[float]]]:
    """The best peak, and the losses of each by tuning seed; called in a process of its own."""
    plan, search = work.plan, work.job
    assert isinstance(search, Search)

    def losses_at(peak: float) -> list[float]:
        job = Fixed("", search.kind, (peak,), plan.num_steps, plan.tuning_seeds)
        return [run["held_out_loss"] for run in _fixed(_task(work.text), plan, job)]

    return tuned_peak(plan.peaks, losses_at)


@lru_cache(maxsize=1)
def _task(text: Path) -> Task:
    return char_lm(read_corpus(text))


def _fixed(task: Task, plan: Plan, job: Fixed) -> list[dict[str, Any]]:
    pairs = [(peak, seed) for peak in job.peaks for seed in job.seeds]
    rates = [rate_of(job.kind, peak, job.num_steps, plan.warmup_steps) for peak, _ in pairs]
    runs = train_side_by_side(task, adam(), rates, [seed for _, seed in pairs], job.num_steps)
    return _as_dicts(runs.held_out_losses, runs.train_losses)


def _compared(task: Task, plan: Plan, job: Compared) -> list[dict[str, Any]]:
    # Counted from 1: prodigy divides by its first rate.
    shape = schedules.knee(
        COMPARATOR_PEAKS[job.label], plan.num_steps, plan.warmup_steps, count_from=1
    )
    optimizer = COMPARATORS[job.label](shape)
    as_it_says = [jnp.ones_like] * len(job.seeds)
    runs = train_side_by_side(task, optimizer, as_it_says, job.seeds, plan.num_steps)
    return _as_dicts(runs.held_out_losses, runs.train_losses)


def _as_dicts(losses: np.ndarray, curves: np.ndarray) -> list[dict[str, Any]]:
    return [
        {"held_out_loss": float(loss), "train_losses": [round(float(x), 4) for x in curve]}
        for loss, curve in zip(losses, curves, strict=True)
    ]


def _tuned(task: Task, plan: Plan, job: Tuned) -> list[dict[str, Any]]:
    config = schedules.TunerConfig(
        total_steps=plan.num_steps, initial_lr=job.initial_lr, variant=job.variant
    )
    runs = TunedRuns(task, adam(), config)
    return [runs.run(seed).values() for seed in job.seeds]
