"""SL5: slack budget against a fixed token budget, with two classes of TBT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxserve.engine.profile import measure_steps
from jaxserve.engine.request import ServiceObjective
from jaxserve.engine.scheduler.budget import SlackBudget
from jaxserve.engine.step_cost import fit_step_cost
from jaxserve.simulator.run import SimRequest
from tools.policy_evaluation.budget_control import PROFILE_S
from tools.policy_evaluation.open_loop import LiveRun, chat_requests, run_live
from tools.policy_evaluation.rig import TOKEN_BUDGET, Rig
from tools.policy_evaluation.verdict import Check, NoiseMeter, Outcome

MAX_ROWS = 256
TTFT_S = 4.0
QUICK, SLOW = 1.3, 5.2
"""TBT of the two classes, in full steps of the fixed token budget."""
MIN_ATTAINMENT = 0.95
START_QPS = 1.5
FACTOR = 1.15
MAX_PROBES = 8


def slack_throughput(rig: Rig, *, num_requests: int = 60, seeds: Sequence[int] = (1,)) -> Outcome:
    """SL5. The highest rate at which 95 % of the requests get every token in time.

    Token n is due at arrival + TTFT + n * TBT. The fixed budget is the one
    whose step keeps the stricter class.
    """
    meter = NoiseMeter(rig)
    meter.sample()
    step_s = meter.median_s("full")
    classes = [ServiceObjective(TTFT_S, factor * step_s) for factor in (QUICK, SLOW)]
    config = rig.scheduler_config("sarathi", MAX_ROWS)
    cost = fit_step_cost(measure_steps(config, rig.executor, limit_s=PROFILE_S))
    rates: dict[str, list[float]] = {"fixed": [], "slack": []}
    probes: list[dict[str, Any]] = []
    for seed in seeds:
        for kind, found in rates.items():
            qps = START_QPS
            best = 0.0
            for _ in range(MAX_PROBES):
                requests = chat_requests(num_requests, qps, seed, classes)
                if kind == "fixed":
                    opened = rig.engine("sarathi", token_budget=TOKEN_BUDGET)
                else:
                    budget = SlackBudget(cost, classes[0], max_rows=MAX_ROWS)
                    opened = rig.engine("slack", token_budget=MAX_ROWS, budget=budget)
                with opened as engine:
                    attained = attainment(run_live(engine, requests), requests)
                probes.append({"kind": kind, "seed": seed, "qps": qps, "attainment": attained})
                meter.sample(4)
                if attained >= MIN_ATTAINMENT:
                    best = qps
                    qps *= FACTOR
                elif best:
                    break
                else:
                    qps /= FACTOR
            found.append(best)
    ratios = [b / a if a else 0.0 for a, b in zip(rates["fixed"], rates["slack"], strict=True)]
    return Outcome(
        "sl5",
        tuple(
            Check(f"rate slack / fixed, seed {seed}", ratio, 1.2, at_most=False)
            for seed, ratio in zip(seeds, ratios, strict=True)
        ),
        {"rates_qps": rates, "probes": probes, "tbt_ms": [1e3 * one.tbt_s for one in classes]}
        | meter.reference_ms(),
        meter.noise(),
    )


def attainment(run: LiveRun, requests: Sequence[SimRequest]) -> float:
    """Share of the requests whose every token came in time."""
    good = 0
    for times_s, request in zip(run.token_s, requests, strict=True):
        objective = request.objective
        assert objective is not None
        due_s = objective.ttft_s + objective.tbt_s * np.arange(len(times_s))
        good += bool(np.all(times_s <= due_s))
    return good / len(requests)
