"""What a classifier's step made of a text, as labels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jaxserve.errors import InvalidRequest
from jaxserve.server.state import Serving

DEFAULT_TOP_K = 5


class RankedLabel(NamedTuple):
    """A label and how well it fits."""

    label_id: int
    text: str
    score: float


def checked_top_k(top_k: int | None, num_classes: int) -> int:
    """How many labels a text gets. Raises InvalidRequest: none, or more than the step ranks."""
    if top_k is None:
        return min(DEFAULT_TOP_K, num_classes)
    if not 1 <= top_k <= num_classes:
        raise InvalidRequest("top_k", f"is {top_k}; this model gives 1 to {num_classes} labels")
    return top_k


def ranked_labels(
    vector: npt.NDArray[np.float32], serving: Serving, top_k: int
) -> list[RankedLabel]:
    """The best labels of a text, best first.

    Args:
        vector: of a step: embedding, scores, ids (negative: no label); see `TextModel.compute`.
        serving: the model.
        top_k: how many.
    """
    size, num_classes = serving.card.embedding_size or 0, serving.card.num_classes
    scores, ids = vector[size : size + num_classes], vector[size + num_classes :]
    return [
        RankedLabel(int(label), serving.label_texts[int(label)], float(score))
        for label, score in zip(ids[:top_k], scores[:top_k], strict=True)
        if label >= 0
    ]
