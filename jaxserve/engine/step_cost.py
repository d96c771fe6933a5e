"""Step cost: how long a step takes, predicted from its totals.

Pure values, so that budgets, the simulator and the live engine share one
model. A model is anything with `predict_s`; `FittedStepCost` is the one that
the engine fits to its own measured steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from jaxserve.engine.step_features import StepFeatures


class StepCost(Protocol):
    def predict_s(self, step: StepFeatures) -> float:
        """Seconds of a step; never falls when a step is added to."""
        ...


@dataclass(frozen=True, slots=True)
class FittedStepCost:
    """t = rows(bucket) + decode_context_s * decode_context + pair_s * prefill_pairs.

    `rows(bucket)` is the measured time of that bucket where there is one, else
    `base_s + row_s * bucket`.
    """

    base_s: float
    row_s: float
    """Per row of the bucket."""
    decode_context_s: float
    """Per key that a decode reads."""
    pair_s: float
    """Per query-key pair of a prefill chunk."""
    bucket_s: tuple[tuple[int, float], ...] = ()
    """(rows, seconds) without attention, ascending in both."""

    def predict_s(self, step: StepFeatures) -> float:
        rows_s = self.base_s + self.row_s * step.num_rows_bucket
        for bucket, seconds in self.bucket_s:
            if bucket == step.num_rows_bucket:
                rows_s = seconds
        return (
            rows_s + self.decode_context_s * step.decode_context + self.pair_s * step.prefill_pairs
        )


def add_chunk(
    step: StepFeatures, start: int, num_tokens: int, num_rows_bucket: int
) -> StepFeatures:
    """`step` with one more prefill chunk, run as a step of that bucket."""
    return StepFeatures(
        num_tokens=step.num_tokens + num_tokens,
        num_rows_bucket=num_rows_bucket,
        num_seqs=step.num_seqs + 1,
        num_decodes=step.num_decodes,
        decode_context=step.decode_context,
        num_prefills=step.num_prefills + 1,
        num_prefill_tokens=step.num_prefill_tokens + num_tokens,
        prefill_pairs=step.prefill_pairs + num_tokens * (start + 0.5 * num_tokens),
    )


def fit_step_cost(samples: Sequence[tuple[StepFeatures, float]]) -> FittedStepCost:
    """Least squares of the relative error, with no coefficient below zero.

    Buckets get times of their own if each of them has two samples or more.

    Args:
        samples: (totals of a step, its measured seconds > 0).

    Raises ValueError if there are none.
    """
    if not samples:
        raise ValueError("a step cost model needs measured steps")
    counts: dict[int, int] = {}
    for step, _ in samples:
        counts[step.num_rows_bucket] = counts.get(step.num_rows_bucket, 0) + 1
    seconds = np.array([measured_s for _, measured_s in samples])
    attention = np.array([[step.decode_context, step.prefill_pairs] for step, _ in samples])
    rows = np.array([step.num_rows_bucket for step, _ in samples])
    linear = _fit(np.column_stack([np.ones(len(rows)), rows, attention]), seconds)
    if min(counts.values()) < 2:
        return FittedStepCost(linear[0], linear[1], linear[2], linear[3])
    buckets = sorted(counts)
    own = _fit(np.column_stack([*(rows == bucket for bucket in buckets), attention]), seconds)
    # A larger bucket is never predicted to be faster: the search for a chunk relies on it.
    bucket_s = np.maximum.accumulate(own[: len(buckets)]).tolist()
    return FittedStepCost(
        linear[0], linear[1], own[-2], own[-1], tuple(zip(buckets, bucket_s, strict=True))
    )


def _fit(features: np.ndarray, seconds: np.ndarray) -> list[float]:
    """Non-negative least squares, leaving out column by column what would be negative."""
    features = features / seconds[:, None]
    kept = list(range(features.shape[1]))
    while kept:
        scale = np.maximum(np.abs(features[:, kept]).max(axis=0), np.finfo(float).tiny)
        solution, *_ = np.linalg.lstsq(features[:, kept] / scale, np.ones(len(seconds)), rcond=None)
        if solution.min() >= 0:
            coefficients = np.zeros(features.shape[1])
            coefficients[kept] = solution / scale
            return [float(value) for value in coefficients]
        kept.pop(int(np.argmin(solution)))
    raise ValueError("the measured steps fit no cost model")
