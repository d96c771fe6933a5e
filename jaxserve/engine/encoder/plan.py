"""EncodePlan: what one step of an encoder does, as plain frozen values.

A step takes whole texts: `num_texts` places of `num_positions` positions each,
in one of a few shapes that were compiled ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxserve.engine.request import FinishReason, Request


class EncodeBucket(NamedTuple):
    """The shape of a compiled step."""

    num_texts: int
    num_positions: int

    @property
    def num_rows(self) -> int:
        return self.num_texts * self.num_positions


class EncodeText(NamedTuple):
    """One text of a step."""

    request_id: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodePlan:
    """One step. Hashable and comparable."""

    step_id: int
    bucket: EncodeBucket
    texts: tuple[EncodeText, ...]
    """At most `bucket.num_texts`, each of at most `bucket.num_positions` tokens."""

    @property
    def num_tokens(self) -> int:
        return sum(len(text.token_ids) for text in self.texts)

    @property
    def num_rows_bucket(self) -> int:
        return self.bucket.num_rows


@dataclass(frozen=True, slots=True)
class EncodeResults:
    """What came back from the device, in the order of the plan's texts."""

    step_id: int
    vectors: npt.NDArray[np.float32]
    """`[len(plan.texts), E]`."""


class EncodeUpdate(NamedTuple):
    """What one committed step did to one request (scheduler -> outputs)."""

    request: Request
    finish_reason: FinishReason
    vector: npt.NDArray[np.float32] | None
    """`[E]`; None when the model gave no finite numbers."""
