"""Two classes of service on one engine: how much load keeps their deadlines?

Half of the requests are a person's, who reads along; half are background work,
which may begin later and give its tokens more slowly. Token n of a request is
due at arrival + TTFT + n x TBT; a request is *served well* if every token of it
is in time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxserve.engine.request import ServiceObjective
from jaxserve.engine.scheduler.budget import SlackBudget
from jaxserve.simulator.capacity import highest_rate
from jaxserve.simulator.experiment import Experiment, Workload
from jaxserve.simulator.run import SimEngine, SimRequest, simulate
from jaxserve.simulator.stopwatch import Stopwatch, Timing

QUICK = ServiceObjective(ttft_s=6.0, tbt_s=0.05)
SLOW = ServiceObjective(ttft_s=60.0, tbt_s=0.4)
MIN_ATTAINMENT = 0.99
RATE_TOLERANCE = 0.02
_GROWTH = 1.2
"""Of the rate, from one that holds to one that does not. Small, since a rate that is far too high
takes long to fail."""


@dataclass(frozen=True, slots=True)
class Goodput:
    """The highest rate at which both classes are served well."""

    qps: float
    attainment: float
    """Share of the requests served well at that rate."""
    worst_class: float
    """The same of the class that fares worse."""
    tokens_per_s: float


def with_classes(requests: Sequence[SimRequest], seed: int) -> list[SimRequest]:
    """Each request's class by a fair coin."""
    quick = np.random.default_rng((seed, 2)).random(len(requests)) < 0.5
    return [
        replace(request, objective=QUICK if is_quick else SLOW)
        for request, is_quick in zip(requests, quick, strict=True)
    ]


def served_well(timing: Timing) -> bool:
    objective = timing.request.generation.objective
    if objective is None:
        raise ValueError("a request of no class has no deadlines")
    due_s = timing.request.arrival_s + objective.ttft_s
    return all(
        token_s <= due_s + index * objective.tbt_s for index, token_s in enumerate(timing.token_s)
    )


def slack_engine(experiment: Experiment, *, max_rows: int) -> SimEngine:
    """Deadline order, and chunks as large as the most urgent decode allows."""
    cost = experiment.cost
    engine = replace(experiment, token_budget=max_rows).engine("slack")
    return replace(
        engine,
        make_budget=lambda: SlackBudget(cost, QUICK, max_rows=max_rows, min_chunk=128),
    )


def find_goodput(engine: SimEngine, workload: Workload, seed: int, *, start_qps: float) -> Goodput:
    """The highest rate at which 99 % of each class are served well, to 2 %, by bisection."""
    best = Goodput(0.0, 0.0, 0.0, 0.0)

    def holds(qps: float) -> bool:
        nonlocal best
        found = goodput_at(engine, workload, seed, qps)
        best = found or best
        return found is not None

    highest_rate(holds, start_qps=start_qps, tolerance=RATE_TOLERANCE, growth=_GROWTH)
    return best


def goodput_at(engine: SimEngine, workload: Workload, seed: int, qps: float) -> Goodput | None:
    """What comes out at that rate; None if fewer than 99 % of a class are served well."""
    requests = with_classes(workload.at(qps), seed)
    run = simulate(engine, requests, give_up=_hopeless(len(requests)))
    if not run.complete:
        return None
    by_class: dict[ServiceObjective, list[bool]] = {QUICK: [], SLOW: []}
    for timing in run.timings:
        objective = timing.request.generation.objective
        assert objective is not None
        by_class[objective].append(served_well(timing))
    worst = min(float(np.mean(well)) for well in by_class.values())
    if worst < MIN_ATTAINMENT:
        return None
    attainment = float(np.mean([served_well(timing) for timing in run.timings]))
    tokens = sum(len(t.token_s) + t.request.num_prompt_tokens for t in run.timings)
    return Goodput(qps, attainment, worst, tokens / run.end_s)


def _hopeless(num_requests: int) -> Callable[[Stopwatch], bool]:
    """Too many requests have ended that were not served well."""
    allowed = int((1 - MIN_ATTAINMENT) * num_requests) + 1
    state = {"seen": 0, "bad": 0}

    def give_up(watch: Stopwatch) -> bool:
        for timing in watch.finished[state["seen"] :]:
            state["bad"] += not served_well(timing)
        state["seen"] = len(watch.finished)
        return state["bad"] > allowed

    return give_up
