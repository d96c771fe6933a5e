"""SL8: the same load in virtual time, on a cost model of this engine's own steps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxserve.engine.step_cost import FittedStepCost
from jaxserve.engine.step_features import StepFeatures
from jaxserve.engine.step_log import CompletedStep
from jaxserve.simulator.cost_models.base import StageCost
from jaxserve.simulator.fitting import fit_held_out
from jaxserve.simulator.metrics import Latencies
from jaxserve.simulator.run import SimEngine, simulate
from tools.policy_evaluation.open_loop import LiveRun, chat_requests, run_live, saturated_qps
from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.verdict import Check, NoiseMeter, Outcome

POLICIES = ("sarathi", "vllm_v0")
MAX_MAPE = 0.10
MAX_PERCENTILE_ERROR = 0.15


@dataclass(frozen=True, slots=True)
class EngineCostModel:
    """A fitted step cost as the simulator takes it: one stage, nothing handed over."""

    fitted: FittedStepCost

    def predict_s(self, step: StepFeatures) -> float:
        return self.fitted.predict_s(step)

    def stage_cost(self, step: StepFeatures) -> StageCost:
        return StageCost(self.predict_s(step), 0.0, 0.0, 0.0, 0.0)

    def transfer_s(self, num_rows: int) -> float:  # noqa: ARG002
        return 0.0


def simulator_accuracy(
    rig: Rig, *, num_requests: int = 60, load: float = 0.45, seed: int = 2
) -> Outcome:
    """SL8, with the accuracy of V12: the model is fitted to every second step.

    Args:
        load: the rate as a share of what full steps of the token budget compute.
    """
    meter = NoiseMeter(rig)
    meter.sample()
    point = rig.point
    qps = load * saturated_qps(point.context, point.token_budget, meter.median_s("full"))
    requests = chat_requests(point.context, num_requests, qps, seed)
    checks: list[Check] = []
    figures: dict[str, Any] = {"qps": qps, "num_requests": num_requests}
    tbt_p99_ms: dict[str, dict[str, float]] = {"live": {}, "simulated": {}}
    for policy in POLICIES:
        steps: list[CompletedStep] = []
        with rig.engine(policy, steps=steps) as engine:
            live = run_live(engine, requests)
        meter.sample()
        fit = fit_held_out([(StepFeatures.of(step.plan), step.duration_s) for step in steps])
        simulated = simulate(
            SimEngine(rig.scheduler_config(policy), EngineCostModel(fit.model)), requests
        )
        percentiles = _compare(live, Latencies.of(simulated.timings))
        checks.append(Check(f"{policy}: MAPE of a step", fit.mape, MAX_MAPE))
        checks += [
            Check(f"{policy}: error of {name}", abs(mine / real - 1), MAX_PERCENTILE_ERROR)
            for name, (real, mine) in percentiles.items()
        ]
        for index, kind in enumerate(tbt_p99_ms):
            tbt_p99_ms[kind][policy] = 1e3 * percentiles["TBT P99"][index]
        figures[policy] = {
            "num_steps": len(steps),
            "mape": fit.mape,
            "live_and_simulated_ms": {
                name: [1e3 * value for value in pair] for name, pair in percentiles.items()
            },
        }
    agree = [min(p99_ms, key=lambda name: p99_ms[name]) for p99_ms in tbt_p99_ms.values()]
    checks.append(Check("same ranking by P99 TBT", float(agree[0] == agree[1]), 1, at_most=False))
    return Outcome("sl8", checks, figures | meter.reference_ms(), meter.noise())


def _compare(live: LiveRun, simulated: Latencies) -> dict[str, tuple[float, float]]:
    """Name -> seconds (live, simulated)."""
    pairs = {"TTFT": (live.ttft_s, simulated.ttft_s), "TBT": (live.tbt_s, simulated.tbt_s)}
    return {
        f"{name} P{level}": (float(np.percentile(one, level)), float(np.percentile(two, level)))
        for name, (one, two) in pairs.items()
        for level in (50, 99)
    }
