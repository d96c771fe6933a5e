"""Slack budgets against fixed ones, and S10: loads that come near the device's limit."""

from __future__ import annotations

import math
from functools import partial

from jaxserve.simulator.stability import run_at_load
from tools.scheduling_validation.finding import Finding, Settings
from tools.slack_gain import compare_budgets

STABILITY_REQUESTS = 20_000


def slack(workload: str, settings: Settings) -> list[Finding]:
    """Two classes of service: deadline order and slack budget against a fixed budget,
    the one that keeps the quick class's objective and the best of a few."""
    gains = list(settings.pool.map(partial(compare_budgets, workload), settings.seeds))
    for seed, gain in zip(settings.seeds, gains, strict=True):
        each = ", ".join(
            f"{name} {one.qps:.2f} qps at {one.attainment:.1%}"
            for name, one in (
                ("slack", gain.slack),
                ("auto", gain.auto),
                (f"tau {gain.best_budget}", gain.best),
            )
        )
        print(
            f"     {workload}, seed {seed}: {each}; without end at most "
            f"{gain.sustained_qps:.2f} qps in any order"
        )
    quantity = f"{workload}: load served well, slack /"
    over_auto = tuple(gain.over_auto for gain in gains)
    over_best = tuple(gain.over_best for gain in gains)
    return [
        Finding("SL", f"{quantity} auto tau", over_auto, 1.2, math.inf),
        Finding("SL", f"{quantity} the best tau", over_best, 1.0, math.inf),
    ]


def s10(settings: Settings) -> list[Finding]:
    """20,000 requests at 0.95 of the device's limit: does the queue grow?"""
    findings = []
    bands = {
        "sarathi": (-0.001, 0.001),
        "orca": (-0.001, 0.001),
        "vllm_v1": (-0.001, 0.001),
        "fastertransformer": (0.01, math.inf),
        "vllm_v0": (0.01, math.inf),
    }
    jobs = {
        policy: settings.pool.submit(
            partial(
                run_at_load,
                policy,
                0.95,
                num_requests=STABILITY_REQUESTS,
                num_prompt=96,
                num_output=96,
            )
        )
        for policy in bands
    }
    for policy, (low, high) in bands.items():
        growth = jobs[policy].result().growth
        findings.append(
            Finding("S10", f"{policy}: delay gained per second, P = D", (growth,), low, high)
        )
    return findings
