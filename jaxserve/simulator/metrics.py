"""Latencies and throughput of a run, as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.simulator.run import SimRun
from jaxserve.simulator.stopwatch import Timing

PERCENTILES = (50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Latencies:
    """Seconds, one value a request; `tbt_s` one value a pair of tokens.

    The time to the first token is no time between tokens. A preemption's gap is.
    """

    ttft_s: np.ndarray
    tbt_s: np.ndarray
    queue_s: np.ndarray
    """Scheduling delay: arrival to first scheduled."""
    e2e_s: np.ndarray

    @classmethod
    def of(cls, timings: Sequence[Timing]) -> Latencies:
        gaps = [np.diff(timing.token_s) for timing in timings]
        return cls(
            ttft_s=np.array([timing.ttft_s for timing in timings]),
            tbt_s=np.concatenate(gaps) if gaps else np.zeros(0),
            queue_s=np.array([timing.queue_s for timing in timings]),
            e2e_s=np.array([timing.e2e_s for timing in timings]),
        )


def summary(run: SimRun) -> dict[str, object]:
    """A run as JSON values."""
    latencies = Latencies.of(run.timings)
    num_output = sum(len(timing.token_s) for timing in run.timings)
    num_prompt = sum(timing.request.num_prompt_tokens for timing in run.timings)
    return {
        "num_requests": len(run.timings),
        "duration_s": run.end_s,
        "ttft_s": percentiles(latencies.ttft_s),
        "tbt_s": percentiles(latencies.tbt_s),
        "scheduling_delay_s": percentiles(latencies.queue_s),
        "e2e_s": percentiles(latencies.e2e_s),
        "output_tokens_per_s": num_output / run.end_s,
        "total_tokens_per_s": (num_output + num_prompt) / run.end_s,
        "num_steps": run.stats.num_steps,
        "mean_step_s": run.stats.busy_s / max(1, run.stats.num_steps),
        "stage_busy_fraction": run.stats.busy_s / run.end_s,
        "bubble_s": run.stats.bubble_s,
        "num_preemptions": run.num_preemptions,
    }


def percentiles(values: np.ndarray) -> dict[str, float] | None:
    """Mean and percentiles by name; None without values."""
    if not len(values):
        return None
    named = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES if p < 100}
    return {"mean": float(values.mean()), **named, "max": float(values.max())}
