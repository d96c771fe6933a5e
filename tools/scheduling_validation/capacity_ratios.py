"""V1 to V6: capacities of Sarathi over those of its rivals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from tools.scheduling_validation.capacity_cell import CapacityCell
from tools.scheduling_validation.finding import Finding, Settings

PUBLISHED_CLIP = 3.0
"""Means at which the published arrival generator cuts its gaps."""
PUBLISHED_REQUESTS = 2048
PUBLISHED_LIMIT_S = 1800.0
"""A published run ends then, with what was served."""
FALCON = "falcon-180b-chat"


def _ratios(
    settings: Settings,
    scenario: str,
    slo: str,
    policies: Sequence[str],
    num_requests: int,
    until_s: float,
) -> dict[str, tuple[float, ...]]:
    """Capacity of Sarathi over each policy's, seed by seed."""
    cells = [
        CapacityCell(scenario, slo, policy, num_requests, settings.clip, until_s=until_s)
        for policy in ("sarathi", *policies)
    ]
    jobs = [
        [settings.pool.submit(cell.capacity, seed) for seed in settings.seeds] for cell in cells
    ]
    ours, *others = [tuple(job.result() for job in row) for row in jobs]
    for cell, values in zip(cells, (ours, *others), strict=True):
        print(f"     {scenario} {slo} {cell.policy}: {', '.join(f'{v:.3f}' for v in values)} qps")
    return {
        policy: tuple(a / b for a, b in zip(ours, theirs, strict=True))
        for policy, theirs in zip(policies, others, strict=True)
    }


def v1_v2(settings: Settings) -> list[Finding]:
    """Yi-34B chat: capacity against vLLM and Orca."""
    bands = {
        ("strict", "vllm_v0"): ("V1", 2.8, 4.6),
        ("relaxed", "vllm_v0"): ("V1", 1.3, 1.95),
        ("strict", "orca"): ("V2", 3.0, 5.0),
        ("relaxed", "orca"): ("V2", 1.9, 3.0),
    }
    return _chat(settings, "yi-34b-chat", bands, settings.num_requests)


def v3(settings: Settings) -> list[Finding]:
    """Mistral-7B chat against vLLM."""
    bands = {
        ("strict", "vllm_v0"): ("V3", 2.1, 3.9),
        ("relaxed", "vllm_v0"): ("V3", 1.2, 1.9),
    }
    return _chat(settings, "mistral-7b-chat", bands, settings.num_requests)


def v4(settings: Settings) -> list[Finding]:
    """arXiv summarisation against Orca."""
    findings = []
    for scenario in ("mistral-7b-arxiv", "yi-34b-arxiv"):
        bands = {(slo, "orca"): ("V4", 1.5, 2.8) for slo in ("strict", "relaxed")}
        findings += _chat(settings, scenario, bands, settings.num_requests)
    return findings


def v5_published(settings: Settings) -> list[Finding]:
    """Falcon-180B chat over two pipeline stages, strict, by the published protocol.

    It is 2048 requests at most, with gaps cut at three means, and whatever comes in half an hour.
    """
    protocol = replace(settings, clip=settings.clip or PUBLISHED_CLIP)
    return _chat(
        protocol,
        FALCON,
        {("strict", "vllm_v0"): ("V5", 2.7, 5.0)},
        PUBLISHED_REQUESTS,
        note=", published protocol",
        until_s=PUBLISHED_LIMIT_S,
    )


def v5(settings: Settings) -> list[Finding]:
    """Falcon-180B chat, all requests, exact arrivals. The strict ratio is printed beside the one of
    the published protocol, without a band of its own."""
    num_requests = max(300, settings.num_requests // 2)
    exact = {("strict", "vllm_v0"): ("V5", -math.inf, math.inf)}
    relaxed = {
        ("relaxed", "vllm_v0"): ("V5", 1.15, 1.9),
        ("relaxed", "orca"): ("V5", 4.0, 7.0),
    }
    return _chat(settings, FALCON, exact | relaxed, num_requests)


def _chat(
    settings: Settings,
    scenario: str,
    bands: dict[tuple[str, str], tuple[str, float, float]],
    num_requests: int,
    note: str = "",
    until_s: float = math.inf,
) -> list[Finding]:
    findings = []
    for slo in dict.fromkeys(slo for slo, _ in bands):
        policies = [policy for name, policy in bands if name == slo]
        ratios = _ratios(settings, scenario, slo, policies, num_requests, until_s)
        for policy in policies:
            band, low, high = bands[slo, policy]
            name = f"{scenario} {slo}{note}: capacity sarathi / {policy}"
            findings.append(Finding(band, name, ratios[policy], low, high))
    return findings


def v6(settings: Settings) -> list[Finding]:
    """vLLM's strict capacity does not depend on its batch limit."""
    capacities = {
        size: settings.each_seed(
            CapacityCell(
                "yi-34b-chat",
                "strict",
                "vllm_v0",
                settings.num_requests,
                settings.clip,
                max_num_seqs=size,
            ).capacity
        )
        for size in (32, 64, 128)
    }
    spreads = tuple(max(values) / min(values) for values in zip(*capacities.values(), strict=True))
    return [
        Finding("V6", "vllm_v0 max batch 32, 64, 128: largest / least capacity", spreads, 1, 1.1)
    ]
