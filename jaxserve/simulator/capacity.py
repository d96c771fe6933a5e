"""Capacity: the highest rate at which a latency objective is met."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.simulator.experiment import Workload
from jaxserve.simulator.metrics import Latencies
from jaxserve.simulator.run import SimEngine, simulate
from jaxserve.simulator.stopwatch import Stopwatch

MAX_SCHEDULING_DELAY_S = 2.0
MAX_PROBES = 20


@dataclass(frozen=True, slots=True)
class Objective:
    """P99 time between tokens, and P50 scheduling delay, at most."""

    tbt_p99_s: float
    delay_p50_s: float = MAX_SCHEDULING_DELAY_S


@dataclass(frozen=True, slots=True)
class Probe:
    """One rate that was tried."""

    qps: float
    meets: bool
    complete: bool
    """False: the run was given up once the objective could not be met any more."""
    tbt_p99_s: float | None = None
    delay_p50_s: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """Capacities of several policies, one a seed."""

    by_policy: dict[str, list[float]]
    num_probes: int

    def median(self, policy: str) -> float:
        return statistics.median(self.by_policy[policy])

    def ratios(self) -> dict[str, list[float]]:
        """Of the first policy to each other one, seed by seed, as "first/other"."""
        first, *others = self.by_policy
        return {
            f"{first}/{other}": [
                a / b if b else float("inf")
                for a, b in zip(self.by_policy[first], self.by_policy[other], strict=True)
            ]
            for other in others
        }

    def summary(self) -> dict[str, object]:
        """Medians over the seeds, with every seed's value beside them."""
        ratios = self.ratios()
        return {
            "capacity_qps": {name: self.median(name) for name in self.by_policy},
            "ratio": {name: statistics.median(values) for name, values in ratios.items()},
            "capacity_qps_by_seed": self.by_policy,
            "ratio_by_seed": ratios,
            "ratio_ci95": {name: confidence_interval(values) for name, values in ratios.items()},
            "num_probes": self.num_probes,
        }


def confidence_interval(values: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of the mean (Student's t); None with fewer than two values."""
    if len(values) < 2:
        return None
    half = _t_975(len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    mean = statistics.fmean(values)
    return mean - half, mean + half


def _t_975(degrees: int) -> float:
    """97.5 % quantile of Student's t."""
    table = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
    return table[degrees - 1] if degrees <= len(table) else 1.96 + 2.5 / degrees


def compare(
    engines: Mapping[str, SimEngine],
    workloads: Mapping[int, Workload],
    objective: Objective,
    *,
    start_qps: float,
) -> Comparison:
    """Each engine's capacity for each workload (by seed)."""
    by_policy: dict[str, list[float]] = {}
    num_probes = 0
    for name, engine in engines.items():
        by_policy[name] = []
        for workload in workloads.values():
            qps, probes = find_capacity(engine, workload, objective, start_qps=start_qps)
            by_policy[name].append(qps)
            num_probes += len(probes)
    return Comparison(by_policy, num_probes)


def probe(
    engine: SimEngine,
    workload: Workload,
    objective: Objective,
    qps: float,
    *,
    until_s: float = math.inf,
) -> Probe:
    """Runs the workload at a rate, up to `until_s`; gives up as soon as the objective is lost."""
    requests = [request for request in workload.at(qps) if request.arrival_s < until_s]
    if not requests:
        raise ValueError(f"nothing arrives within {until_s:g} s at {qps:g} requests per second")
    num_gaps = sum(request.lengths.num_output_tokens - 1 for request in requests)
    # One more than a percentile that interpolates could leave aside.
    most_stalls = int(0.01 * num_gaps) + 1
    most_late = len(requests) // 2 + 1
    stopwatch = Stopwatch(stall_s=objective.tbt_p99_s, late_s=objective.delay_p50_s)
    run = simulate(
        engine,
        requests,
        stopwatch=stopwatch,
        until_s=until_s,
        give_up=lambda watch: watch.num_stalls > most_stalls or watch.num_late > most_late,
    )
    if not run.complete:
        return Probe(qps, meets=False, complete=False)
    latencies = Latencies.of(run.timings)
    tbt_s = float(np.percentile(latencies.tbt_s, 99)) if len(latencies.tbt_s) else 0.0
    delay_s = float(np.percentile(latencies.queue_s, 50))
    meets = tbt_s <= objective.tbt_p99_s and delay_s <= objective.delay_p50_s
    return Probe(qps, meets, complete=True, tbt_p99_s=tbt_s, delay_p50_s=delay_s)


def find_capacity(
    engine: SimEngine,
    workload: Workload,
    objective: Objective,
    *,
    start_qps: float,
    tolerance: float = 0.025,
    until_s: float = math.inf,
    on_probe: Callable[[Probe], None] | None = None,
) -> tuple[float, list[Probe]]:
    """The highest rate that meets the objective, and every rate tried.

    See `highest_rate`; rates are doubled or halved. Each run ends at `until_s` at the latest, and
    what had been served by then is what counts.
    """
    probes: list[Probe] = []

    def meets(qps: float) -> bool:
        result = probe(engine, workload, objective, qps, until_s=until_s)
        probes.append(result)
        if on_probe is not None:
            on_probe(result)
        return result.meets

    return highest_rate(meets, start_qps=start_qps, tolerance=tolerance), probes


def highest_rate(
    meets: Callable[[float], bool],
    *,
    start_qps: float,
    tolerance: float,
    growth: float = 2.0,
    max_steps: int = MAX_PROBES,
) -> float:
    """The highest rate at which `meets` holds, in virtual or in real time.

    From `start_qps` the rate is multiplied or divided by `growth`, at most
    `max_steps` times, until the answer lies between two rates; these are then
    bisected until they are `tolerance` apart (relative). 0.0 if no rate that
    was tried meets it.
    """
    low, high = 0.0, 0.0
    qps = start_qps
    for _ in range(max_steps):
        if meets(qps):
            low = qps
            if high:
                break
            qps *= growth
        else:
            high = qps
            if low:
                break
            qps /= growth
    if not (low and high):
        return low
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        if meets(middle):
            low = middle
        else:
            high = middle
    return low
