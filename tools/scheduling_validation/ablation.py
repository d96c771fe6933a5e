"""V7: what each half of stall-free batching is worth."""

from __future__ import annotations

import math
from functools import partial

from jaxserve.simulator.arrivals import ArrivalProcess
from jaxserve.simulator.experiment import make_workload
from jaxserve.simulator.metrics import Latencies, percentiles
from jaxserve.simulator.run import simulate
from jaxserve.simulator.scenarios import find_scenario
from tools.scheduling_validation.capacity_cell import experiment_of
from tools.scheduling_validation.finding import Finding, Settings


def v7(settings: Settings) -> list[Finding]:
    """Each half of stall-free batching alone against both."""
    findings = []
    for scenario, qps in (("yi-34b-chat", 1.0), ("yi-34b-arxiv", 0.5)):
        both, hybrid, chunked = (
            list(settings.pool.map(partial(_ablation, scenario, qps, policy), settings.seeds))
            for policy in ("sarathi", "hybrid_only", "chunked_only")
        )

        for name, ours, theirs, index, low, high in (
            ("P99 TBT hybrid_only / both", hybrid, both, 1, 3.0, math.inf),
            ("P50 TTFT chunked_only / both", chunked, both, 0, 1.15, math.inf),
            ("P99 TBT both / chunked_only", both, chunked, 1, 0.0, 1.0),
        ):
            ratios = tuple(a[index] / b[index] for a, b in zip(ours, theirs, strict=True))
            findings.append(Finding("V7", f"{scenario}: {name}", ratios, low, high))
    return findings


def _ablation(scenario: str, qps: float, policy: str, seed: int) -> tuple[float, float]:
    """P50 TTFT and P99 TBT of 128 requests with a budget of 512."""
    found = find_scenario(scenario)
    workload = make_workload(
        found.workload, 128, seed, max_model_len=found.max_model_len, arrivals=ArrivalProcess()
    )
    run = simulate(experiment_of(scenario, "strict", 512).engine(policy), workload.at(qps))
    latencies = Latencies.of(run.timings)
    ttft, tbt = percentiles(latencies.ttft_s), percentiles(latencies.tbt_s)
    assert ttft is not None
    assert tbt is not None
    return ttft["p50"], tbt["p99"]
