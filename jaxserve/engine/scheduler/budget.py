"""How large a step may be, and which compiled step holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class StepBudget(Protocol):
    """Limits a step's size; policies only choose what goes in."""

    def max_rows(self) -> int:
        """Most rows of the step that is about to be planned; at most the
        configured token budget. Decodes go in even if they are more."""
        ...


class TokenBudget:
    """The same number of rows for every step (tau)."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def max_rows(self) -> int:
        return self._num_tokens


def smallest_bucket(buckets: Sequence[int], num_rows: int) -> int:
    """The first of the ascending `buckets` with at least `num_rows` rows.

    Raises ValueError if there is none.
    """
    for bucket in buckets:
        if bucket >= num_rows:
            return bucket
    raise ValueError(f"no bucket of {tuple(buckets)} holds {num_rows} rows")
