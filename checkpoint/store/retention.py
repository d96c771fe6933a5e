"""Which checkpoints may go. Pure: decides on numbers, touches no files."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from checkpoint.store.errors import StoreError


@dataclass(frozen=True)
class RetentionPolicy:
    """What is kept; a step is deleted only if no rule keeps it.

    Attributes:
        keep_last: this many of the newest steps, at least 1.
        keep_every: every step divisible by it; None: no such rule.
        best_metric: a name in `metadata["metrics"]`; None: no such rule.
        best_mode: whether the smallest or the largest value is best.
        keep_best: this many of the best.
    """

    keep_last: int = 3
    keep_every: int | None = None
    best_metric: str | None = None
    best_mode: Literal["min", "max"] = "min"
    keep_best: int = 1

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise StoreError(f"keep_last is {self.keep_last}; at least 1 step must be kept")
        if self.keep_every is not None and self.keep_every < 1:
            raise StoreError(f"keep_every is {self.keep_every}; use 1 or more, or None")
        if self.keep_best < 1:
            raise StoreError(f"keep_best is {self.keep_best}; for none, leave out best_metric")


def steps_to_delete(
    policy: RetentionPolicy, metrics: Mapping[int, float | None], protected: Collection[int]
) -> list[int]:
    """The steps that no rule keeps, oldest first.

    Args:
        policy: the rules.
        metrics: every step, with the value of `best_metric` where it has one.
        protected: steps that stay whatever the rules say.
    """
    newest_first = sorted(metrics, reverse=True)
    kept = {*protected, *newest_first[: policy.keep_last]}
    if policy.keep_every is not None:
        kept.update(step for step in metrics if step % policy.keep_every == 0)
    if policy.best_metric is not None:
        sign = 1 if policy.best_mode == "min" else -1
        valued = [(sign * value, -step) for step, value in metrics.items() if value is not None]
        kept.update(-negated for _, negated in sorted(valued)[: policy.keep_best])
    return [step for step in sorted(metrics) if step not in kept]
