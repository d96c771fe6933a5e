"""Capacity: the highest rate at which a latency objective is met."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.simulator.metrics import Latencies
from jaxserve.simulator.run import SimEngine, SimRequest, simulate
from jaxserve.simulator.stopwatch import Stopwatch
from jaxserve.simulator.workloads import Lengths

MAX_SCHEDULING_DELAY_S = 2.0
MAX_PROBES = 20


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests without a rate: `unit_times_s` are for one request a second."""

    lengths: Sequence[Lengths]
    unit_times_s: np.ndarray

    def at(self, qps: float) -> list[SimRequest]:
        times_s = self.unit_times_s / qps
        return [
            SimRequest(lengths, float(time_s))
            for lengths, time_s in zip(self.lengths, times_s, strict=True)
        ]


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


def probe(engine: SimEngine, workload: Workload, objective: Objective, qps: float) -> Probe:
    """Runs the workload at a rate; gives up as soon as the objective is lost."""
    num_gaps = sum(lengths.num_output_tokens - 1 for lengths in workload.lengths)
    # One more than a percentile that interpolates could leave aside.
    most_stalls = int(0.01 * num_gaps) + 1
    most_late = len(workload.lengths) // 2 + 1
    stopwatch = Stopwatch(stall_s=objective.tbt_p99_s, late_s=objective.delay_p50_s)
    run = simulate(
        engine,
        workload.at(qps),
        stopwatch=stopwatch,
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
    on_probe: Callable[[Probe], None] | None = None,
) -> tuple[float, list[Probe]]:
    """The highest rate that meets the objective, and every rate tried.

    From `start_qps` the rate is doubled or halved until the answer lies
    between two rates, then bisected until they are `tolerance` apart
    (relative). 0.0 if no rate down to a 2**-20th of the start meets it.
    """
    probes: list[Probe] = []

    def meets(qps: float) -> bool:
        result = probe(engine, workload, objective, qps)
        probes.append(result)
        if on_probe is not None:
            on_probe(result)
        return result.meets

    low, high = 0.0, 0.0
    qps = start_qps
    for _ in range(MAX_PROBES):
        if meets(qps):
            low = qps
            if high:
                break
            qps *= 2
        else:
            high = qps
            if low:
                break
            qps /= 2
    if not (low and high):
        return low, probes
    while high / low > 1 + tolerance:
        middle = (low * high) ** 0.5
        if meets(middle):
            low = middle
        else:
            high = middle
    return low, probes
