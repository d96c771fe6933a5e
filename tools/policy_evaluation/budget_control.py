"""SL4: the token budget that a TBT objective asks for keeps it, the next larger one doesn't."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np

from jaxserve.engine.profile import measure_steps
from jaxserve.engine.request import ServiceObjective
from jaxserve.engine.scheduler.budget import TBT_MARGIN, decode_step
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.sizing import make_scheduler
from jaxserve.engine.step_cost import FittedStepCost, add_chunk, fit_step_cost
from jaxserve.errors import ConfigError
from tools.policy_evaluation.cells import Cells
from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.streams import run_long_prompts
from tools.policy_evaluation.verdict import Check, NoiseMeter, Outcome

STEADY_PROMPT = 300
"""At small budgets the first streams are far ahead when the last one starts;
all of them then run around half of the context, which sizing assumes."""
PROFILE_S = 30.0
SLACK = 1.1
"""Objective over the shortest one for which sizing would take that budget."""
MIN_CHUNKS = 80
"""Of long prompts at each budget: P99 then is not the one worst step."""


def objective_keeps(rig: Rig, cells: Cells) -> Outcome:
    """SL4. Three objectives; the engine's own sizing chooses, as for --slo-tbt-ms."""
    budgets = rig.point.control_budgets
    sizing = cells.get("sizing", partial(_sizing, rig))
    tbt_p99_s = {
        rows: cells.get(f"tbt-{rows}", partial(_tbt, rig, rows, step_s))["p99_s"]
        for rows, step_s in zip(budgets, sizing["full_step_s"], strict=True)
    }
    checks: list[Check] = []
    figures: list[dict[str, float]] = []
    for index, (rows, larger) in enumerate(pairwise(budgets)):
        slo_s, chosen = sizing["slo_s"][index], sizing["chosen"][index]
        kept_s, broken_s = tbt_p99_s[rows], tbt_p99_s[larger]
        label = f"SLO {slo_s * 1e3:.1f} ms"
        checks += [
            Check(f"{label}: chosen budget / {rows}", chosen / rows, 1.0, at_most=False),
            Check(f"{label}: chosen budget / {rows}", chosen / rows, 1.0),
            Check(f"{label}: P99 TBT / SLO at {rows} rows", kept_s / slo_s, 1.0),
            Check(f"{label}: P99 TBT / SLO at {larger} rows", broken_s / slo_s, 1.0, at_most=False),
        ]
        figures.append(
            {
                "slo_ms": 1e3 * slo_s,
                "token_budget": chosen,
                "tbt_p99_ms": 1e3 * kept_s,
                "tbt_p99_ms_next_budget": 1e3 * broken_s,
            }
        )
    readings = cells.readings()
    return Outcome(
        "sl4", checks, {"objectives": figures} | readings.reference_ms(), readings.noise()
    )


def _sizing(rig: Rig, _: NoiseMeter) -> dict[str, Any]:
    """What full steps should take, the objectives, and the budgets that the engine chooses."""
    budgets = rig.point.control_budgets
    cost = fit_step_cost(measure_steps(_config(rig), rig.executor, limit_s=PROFILE_S))
    full_step_s = [_predicted_s(rig, cost, rows) for rows in budgets]
    slo_s = [SLACK * step_s / TBT_MARGIN for step_s in full_step_s[:-1]]
    return {
        "full_step_s": full_step_s,
        "slo_s": slo_s,
        "chosen": [_sized(rig, one_s) for one_s in slo_s],
    }


def _config(rig: Rig) -> SchedulerConfig:
    return rig.scheduler_config("sarathi", rig.point.control_budgets[-1])


def _sized(rig: Rig, slo_s: float) -> int:
    """The token budget that the engine chooses at start; 0 if it refuses."""
    settings = replace(
        rig.settings,
        scheduler=_config(rig),
        objective=ServiceObjective(ttft_s=6.0, tbt_s=slo_s),
        has_tbt_objective=True,
    )
    try:
        sized, _ = make_scheduler(settings, rig.executor, limit_s=PROFILE_S)
    except ConfigError:  # No budget keeps it now, though one did a moment ago.
        return 0
    return sized.scheduler.token_budget


def _predicted_s(rig: Rig, cost: FittedStepCost, num_rows: int) -> float:
    """Sizing's own full step: every slot decodes at half of the context, and a prompt's last
    chunk is beside them."""
    longest, num_slots = rig.point.context, rig.point.max_num_seqs
    step = decode_step(num_slots, num_slots * (longest // 2), num_rows)
    return cost.predict_s(add_chunk(step, longest, num_rows - num_slots, num_rows))


def _tbt(rig: Rig, token_budget: int, full_step_s: float, _: NoiseMeter) -> dict[str, Any]:
    """P99 between tokens of steady streams while long prompts come."""
    num_steady, prompt_len = rig.point.max_num_seqs - 1, rig.point.long_prompt
    num_chunks = prompt_len / (token_budget - num_steady)
    num_prompts = math.ceil(MIN_CHUNKS / num_chunks)
    with rig.engine("sarathi", token_budget=token_budget) as engine:
        run = run_long_prompts(
            engine,
            num_steady=num_steady,
            steady_prompt=STEADY_PROMPT,
            prompt_len=prompt_len,
            period_s=1.3 * num_chunks * full_step_s,
            num_prompts=num_prompts,
        )
    p50_s, p99_s, max_s = np.percentile(run.gaps_s, (50, 99, 100)).tolist()
    return {"p50_s": p50_s, "p99_s": p99_s, "max_s": max_s, "num_prompts": num_prompts}
