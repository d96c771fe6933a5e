"""SL4: the token budget that a TBT objective asks for keeps it, the next larger one doesn't."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np

from jaxserve.engine.profile import measure_steps
from jaxserve.engine.request import ServiceObjective
from jaxserve.engine.scheduler.budget import TBT_MARGIN
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.sizing import make_scheduler
from jaxserve.engine.step_cost import FittedStepCost, fit_step_cost
from jaxserve.engine.step_features import StepFeatures
from jaxserve.errors import ConfigError
from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.streams import run_long_prompts
from tools.policy_evaluation.verdict import Check, NoiseMeter, Outcome

STEADY_PROMPT = 300
"""At small budgets the first streams are far ahead when the last one starts;
all of them then run around half of the context, which sizing assumes."""
PROFILE_S = 30.0
SLACK = 1.1
"""Objective over the shortest one for which sizing would take that budget."""


def objective_keeps(rig: Rig, *, num_prompts: int = 2) -> Outcome:
    """SL4. Three objectives; the engine's own sizing chooses, as for --slo-tbt-ms."""
    meter = NoiseMeter(rig)
    meter.sample()
    cost = fit_step_cost(measure_steps(_config(rig), rig.executor, limit_s=PROFILE_S))
    checks: list[Check] = []
    figures: list[dict[str, float]] = []
    for rows, larger in pairwise(rig.point.control_budgets):
        slo_s = SLACK * _predicted_s(rig, cost, rows) / TBT_MARGIN
        chosen = _sized(rig, slo_s)
        kept_s = _tbt_p99_s(rig, rows, cost, num_prompts)
        broken_s = _tbt_p99_s(rig, larger, cost, num_prompts)
        meter.sample()
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
    return Outcome("sl4", checks, {"objectives": figures} | meter.reference_ms(), meter.noise())


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
    """Sizing's own full step: every slot decodes at half of the context."""
    half, num_slots = rig.point.context // 2, rig.point.max_num_seqs
    step = StepFeatures.of_hybrid(num_slots, half, num_rows - num_slots, half)
    return cost.predict_s(step)


def _tbt_p99_s(rig: Rig, token_budget: int, cost: FittedStepCost, num_prompts: int) -> float:
    num_steady, prompt_len = rig.point.max_num_seqs - 1, rig.point.long_prompt
    prefill_s = prompt_len / (token_budget - num_steady) * _predicted_s(rig, cost, token_budget)
    with rig.engine("sarathi", token_budget=token_budget) as engine:
        run = run_long_prompts(
            engine,
            num_steady=num_steady,
            steady_prompt=STEADY_PROMPT,
            prompt_len=prompt_len,
            period_s=1.3 * prefill_s,
            num_prompts=num_prompts,
        )
    return float(np.percentile(run.gaps_s, 99))
