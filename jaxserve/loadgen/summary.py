"""From records to figures, each with its confidence interval."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from jaxserve.loadgen.records import LoadRecord, RequestRecord
from jaxserve.loadgen.slo import ServiceLevel

PERCENTILES = (50, 90, 99, 100)
NUM_RESAMPLES = 200


def summarize(run: LoadRecord, level: ServiceLevel, *, seed: int = 0) -> dict[str, object]:
    """A run as JSON values; units are in the names.

    Latencies are of measured requests that succeeded. Rates are over the time
    from the first measured arrival to the last token of all.
    """
    measured = [record for record in run.requests if record.planned.is_measured]
    good = [record for record in measured if record.is_ok]
    rng = np.random.default_rng(seed)
    span_s = _span_s(measured, run.elapsed_s)
    reasons = run.health.void_reasons()
    return {
        "num_requests": len(measured),
        "num_ramp_requests": len(run.requests) - len(measured),
        "num_failed": len(measured) - len(good),
        "status": dict(Counter(record.status for record in measured)),
        "elapsed_s": run.elapsed_s,
        "offered_qps": (len(measured) - 1) / max(_arrival_span_s(measured), 1e-9),
        "requests_per_s": len(good) / span_s,
        "output_tokens_per_s": sum(record.num_tokens for record in good) / span_s,
        "num_output_tokens": sum(record.num_tokens for record in good),
        "num_messages": sum(len(record.message_s) for record in good),
        "ttft_ms": distribution_ms([np.array([record.ttft_s]) for record in good], rng),
        "tpot_ms": distribution_ms(
            [np.array([record.tpot_s]) for record in good if record.tpot_s is not None], rng
        ),
        "tbt_ms": distribution_ms([record.tbt_s for record in good], rng),
        "e2e_ms": distribution_ms([np.array([record.e2e_s]) for record in good], rng),
        "scheduling_delay_ms": distribution_ms(
            [np.array([record.queue_s]) for record in good if record.queue_s is not None], rng
        ),
        "goodput": _goodput(measured, level, span_s) if level.is_set else None,
        "generator": asdict(run.health) | {"void": bool(reasons), "void_reasons": reasons},
    }


def distribution_ms(
    by_request: Sequence[np.ndarray], rng: np.random.Generator
) -> dict[str, object] | None:
    """Mean and percentiles in ms, with 95 % bootstrap intervals.

    Requests are resampled, not single values: the gaps of one request are
    alike, and an interval that took them for independent would be too narrow.

    Args:
        by_request: seconds, one array a request; empty ones count for nothing.

    None if there is no value at all.
    """
    arrays = [values for values in by_request if len(values)]
    if not arrays:
        return None
    estimate = _figures(np.concatenate(arrays))
    resampled = []
    for _ in range(NUM_RESAMPLES):
        chosen = rng.integers(0, len(arrays), len(arrays))
        resampled.append(_figures(np.concatenate([arrays[index] for index in chosen])))
    low, high = np.percentile(resampled, (2.5, 97.5), axis=0)
    names = ["mean", *(f"p{p}" if p < 100 else "max" for p in PERCENTILES)]
    # A resample has no value above the largest one, so the maximum gets no interval.
    return {
        "num_values": sum(len(values) for values in arrays),
        **{name: float(value) for name, value in zip(names, estimate, strict=True)},
        "ci95": {
            name: [float(low[index]), float(high[index])]
            for index, name in enumerate(names)
            if name != "max"
        },
    }


def _figures(seconds: np.ndarray) -> np.ndarray:
    figures: np.ndarray = 1e3 * np.array([seconds.mean(), *np.percentile(seconds, PERCENTILES)])
    return figures


def _goodput(
    measured: Sequence[RequestRecord], level: ServiceLevel, span_s: float
) -> dict[str, object]:
    num_good = sum(level.is_met_by(record) for record in measured)
    return {
        "goal_ttft_ms": None if level.ttft_s is None else 1e3 * level.ttft_s,
        "goal_tbt_ms": None if level.tbt_s is None else 1e3 * level.tbt_s,
        "attainment": num_good / max(1, len(measured)),
        "requests_per_s": num_good / span_s,
    }


def _span_s(measured: Sequence[RequestRecord], elapsed_s: float) -> float:
    first_s = min((record.planned.due_s for record in measured), default=0.0)
    return max(elapsed_s - first_s, 1e-9)


def _arrival_span_s(measured: Sequence[RequestRecord]) -> float:
    due_s = [record.planned.due_s for record in measured]
    return max(due_s, default=0.0) - min(due_s, default=0.0)
