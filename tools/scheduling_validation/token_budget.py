"""V8: capacity over the token budget, and the budget that the engine would choose."""

from __future__ import annotations

import statistics
from itertools import pairwise

from jaxserve.engine.scheduler.auto_budget import auto_token_budget
from jaxserve.simulator.scenarios import find_scenario
from tools.scheduling_validation.capacity_cell import CapacityCell, experiment_of
from tools.scheduling_validation.finding import Finding, Settings

TAU_SWEEP = (128, 256, 384, 512, 640, 768, 1024)


def v8(settings: Settings) -> list[Finding]:
    """Capacity over the token budget has one peak and a cliff; auto-tau is near the peak."""
    scenario, slo = "yi-34b-chat", "strict"
    tau = _auto_tau(scenario, slo)
    sweep = {
        size: settings.each_seed(
            CapacityCell(
                scenario, slo, "sarathi", settings.num_requests, settings.clip, token_budget=size
            ).capacity
        )
        for size in sorted({*TAU_SWEEP, tau})
    }
    medians = {size: statistics.median(values) for size, values in sweep.items()}
    print("     tau: " + ", ".join(f"{size} -> {qps:.3f}" for size, qps in medians.items()))
    best = max(medians, key=lambda size: medians[size])
    sizes = list(medians)
    peak = sizes.index(best)
    # Within the search's own tolerance of 2.5 %.
    unimodal = all(medians[b] >= 0.95 * medians[a] for a, b in pairwise(sizes[: peak + 1])) and all(
        medians[b] <= 1.05 * medians[a] for a, b in pairwise(sizes[peak:])
    )
    return [
        Finding("V8", "tau sweep has one peak (1 = yes)", (float(unimodal),), 1, 1),
        Finding("V8", "capacity at tau = 1024 / best", (medians[1024] / medians[best],), 0, 0.5),
        Finding("V8", f"capacity at auto-tau {tau} / best ({best})",
                tuple(a / b for a, b in zip(sweep[tau], sweep[best], strict=True)), 0.9, 1.1),
    ]  # fmt: skip


def _auto_tau(scenario: str, slo: str) -> int:
    """As the engine chooses it for `--slo-tbt-ms`, but without a margin: here a step takes just
    what its cost model says, while there the host and chance add to it."""
    experiment = experiment_of(scenario, slo)
    config = experiment.engine("sarathi").scheduler
    slo_s = find_scenario(scenario).slo_s(slo)
    return auto_token_budget(config, experiment.cost, slo_s, range(128, 2049, 64), margin=1.0)
