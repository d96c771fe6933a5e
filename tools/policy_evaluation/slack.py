"""SL5: slack budget against a fixed token budget, with two classes of TBT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np

from jaxserve.engine.profile import measure_steps
from jaxserve.engine.request import ServiceObjective
from jaxserve.engine.scheduler.budget import SlackBudget
from jaxserve.engine.step_cost import FittedStepCost, fit_step_cost
from jaxserve.simulator.run import SimRequest
from tools.policy_evaluation.budget_control import PROFILE_S
from tools.policy_evaluation.cells import Cells
from tools.policy_evaluation.ladder import Ladder
from tools.policy_evaluation.open_loop import LiveRun, chat_requests, run_live, saturated_qps
from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.steps import StepShape, time_steps
from tools.policy_evaluation.verdict import STEADY_CONTEXT, Check, NoiseMeter, Outcome

QUICK, SLOW = 1.3, 5.2
"""TBT of the two classes, in full steps of the fixed token budget."""
TTFT = 78.0
"""Of both classes, in full steps: 60 times the stricter TBT."""
MIN_ATTAINMENT = 0.95
MIN_RATIO = 1.2
LADDER = Ladder(1.1)
START_SHARE = 1.3
"""Rate of rung 0, as a share of what the fixed budget computes if its steps are always full: it
misses there, unless so few requests come that their TTFT outlasts the load."""


def slack_throughput(
    rig: Rig, cells: Cells, *, num_requests: int = 80, seeds: Sequence[int] = (1, 2, 3)
) -> Outcome:
    """SL5. The highest rate at which 95 % of the requests get every token in time.

    Token n is due at arrival + TTFT + n * TBT. The fixed budget is the one
    whose step keeps the stricter class. The reference's times are those of a cell once they are
    scaled by what a full step took just before it.
    """
    reference = cells.get("reference", partial(_reference, rig))
    probes: list[dict[str, Any]] = []

    def meets(seed: int, kind: str, rung: int) -> bool:
        measure = partial(_probe, rig, reference, kind, rung, num_requests, seed)
        found = cells.get(f"{num_requests}.seed-{seed}.{kind}.{rung}", measure)
        probes.append({"kind": kind, "seed": seed, "rung": rung} | found)
        return bool(found["attainment"] >= MIN_ATTAINMENT)

    gains = {
        seed: LADDER.gain(
            partial(meets, seed, "slack"), partial(meets, seed, "fixed"), 0, MIN_RATIO
        )
        for seed in seeds
    }
    return Outcome(
        "sl5",
        tuple(
            Check(
                f"rate slack / fixed, seed {seed}", LADDER.factor**rungs, MIN_RATIO, at_most=False
            )
            for seed, (rungs, _) in gains.items()
        ),
        {
            "may_be_more": {seed: may_be_more for seed, (_, may_be_more) in gains.items()},
            "probes": probes,
            "num_requests": num_requests,
        }
        | cells.readings().reference_ms(),
        cells.worst_noise(),
    )


def _reference(rig: Rig, meter: NoiseMeter) -> dict[str, Any]:
    point = rig.point
    step_s = _full_step_s(rig)
    config = rig.scheduler_config("sarathi", point.slack_max_rows)
    cost = fit_step_cost(measure_steps(config, rig.executor, limit_s=PROFILE_S))
    qps = START_SHARE * saturated_qps(point.context, point.slack_budget, step_s)
    return {
        "full_s": meter.median_s("full"),
        "step_s": step_s,
        "rung_0_qps": qps,
        "cost": asdict(cost),
    }


def _classes(step_s: float) -> list[ServiceObjective]:
    return [ServiceObjective(TTFT * step_s, factor * step_s) for factor in (QUICK, SLOW)]


def _probe(
    rig: Rig,
    reference: Mapping[str, Any],
    kind: str,
    rung: int,
    num_requests: int,
    seed: int,
    meter: NoiseMeter,
) -> dict[str, Any]:
    """One rate of a ladder whose times are the reference's at the machine's present speed."""
    point = rig.point
    slower = meter.median_s("full") / reference["full_s"]
    classes = _classes(slower * reference["step_s"])
    qps = reference["rung_0_qps"] * LADDER.factor**rung / slower
    requests = chat_requests(point.context, num_requests, qps, seed, classes)
    if kind == "fixed":
        opened = rig.engine("sarathi", token_budget=point.slack_budget)
    else:
        cost = _scaled(FittedStepCost(**reference["cost"]), slower)
        budget = SlackBudget(cost, classes[0], max_rows=point.slack_max_rows)
        opened = rig.engine("slack", token_budget=point.slack_max_rows, budget=budget)
    with opened as engine:
        attained = attainment(run_live(engine, requests), requests)
    return {"qps": qps, "tbt_ms": [1e3 * one.tbt_s for one in classes], "attainment": attained}


def _scaled(cost: FittedStepCost, factor: float) -> FittedStepCost:
    """Of a machine on which every step takes `factor` times as long."""
    return replace(
        cost,
        base_s=factor * cost.base_s,
        row_s=factor * cost.row_s,
        decode_context_s=factor * cost.decode_context_s,
        pair_s=factor * cost.pair_s,
        bucket_s=tuple((rows, factor * seconds) for rows, seconds in cost.bucket_s),
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
