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
from tools.policy_evaluation.open_loop import LiveRun, chat_requests, run_live, saturated_qps
from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.steps import StepShape, time_steps
from tools.policy_evaluation.verdict import STEADY_CONTEXT, Check, NoiseMeter, Outcome

QUICK, SLOW = 1.3, 5.2
"""TBT of the two classes, in full steps of the fixed token budget."""
TTFT = 78.0
"""Of both classes, in full steps: 60 times the stricter TBT."""
MIN_ATTAINMENT = 0.95
FACTOR = 1.1
MAX_PROBES = 8
START_SHARE = 0.75
"""First rate, as a share of what the fixed budget computes if its steps are always full."""


def slack_throughput(rig: Rig, *, num_requests: int = 80, seeds: Sequence[int] = (1,)) -> Outcome:
    """SL5. The highest rate at which 95 % of the requests get every token in time.

    Token n is due at arrival + TTFT + n * TBT. The fixed budget is the one
    whose step keeps the stricter class.
    """
    meter = NoiseMeter(rig)
    meter.sample()
    point, max_rows = rig.point, rig.point.slack_max_rows
    step_s = _full_step_s(rig)
    classes = [ServiceObjective(TTFT * step_s, factor * step_s) for factor in (QUICK, SLOW)]
    config = rig.scheduler_config("sarathi", max_rows)
    cost = fit_step_cost(measure_steps(config, rig.executor, limit_s=PROFILE_S))
    rates: dict[str, list[float]] = {"fixed": [], "slack": []}
    start_qps = START_SHARE * saturated_qps(point.context, point.slack_budget, step_s)
    probes: list[dict[str, Any]] = []
    for seed in seeds:
        for kind, found in rates.items():
            # Slack is expected to be faster, so its ladder begins higher.
            qps = rates["fixed"][-1] * FACTOR**2 if kind == "slack" else start_qps
            qps = qps or start_qps
            best = 0.0
            for _ in range(MAX_PROBES):
                requests = chat_requests(point.context, num_requests, qps, seed, classes)
                if kind == "fixed":
                    opened = rig.engine("sarathi", token_budget=point.slack_budget)
                else:
                    budget = SlackBudget(cost, classes[0], max_rows=max_rows)
                    opened = rig.engine("slack", token_budget=max_rows, budget=budget)
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
        | {"fixed_step_ms": 1e3 * step_s}
        | meter.reference_ms(),
        meter.noise(),
    )


def _full_step_s(rig: Rig) -> float:
    """Of the fixed budget, in the middle of a long prompt beside the steady decodes."""
    budget, steady = rig.point.slack_budget, rig.point.num_steady
    shape = StepShape(budget, steady, STEADY_CONTEXT, budget - steady, rig.point.long_prompt // 2)
    return float(np.median(time_steps(rig.executor, {"full": shape}, 20)["full"]))


def attainment(run: LiveRun, requests: Sequence[SimRequest]) -> float:
    """Share of the requests whose every token came in time."""
    good = 0
    for times_s, request in zip(run.token_s, requests, strict=True):
        objective = request.objective
        assert objective is not None
        due_s = objective.ttft_s + objective.tbt_s * np.arange(len(times_s))
        good += bool(np.all(times_s <= due_s))
    return good / len(requests)
