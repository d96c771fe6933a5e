"""WeightSwaps: what has become of attempts to exchange the weights being served."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class WeightSwaps:
    """Counts since the engine started."""

    num_done: int = 0
    num_refused: int = 0
