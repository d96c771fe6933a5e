"""Rows: training examples as the step takes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, slots=True)
class Rows:
    """`n` examples of `T` positions each.

    Attributes:
        inputs: token at each position, int32 [n, T]; 0 in padding.
        targets: token to be predicted there, int32 [n, T]; 0 in padding.
        weights: 1 where the target counts in the loss, else 0, uint8 [n, T].
        segment_ids: documents of the row, numbered from 1, int32 [n, T]; 0 in padding.
            A position attends to earlier positions of its own segment only.
        positions: place within the segment's part of the row, int32 [n, T]; 0 in padding.
    """

    inputs: npt.NDArray[np.int32]
    targets: npt.NDArray[np.int32]
    weights: npt.NDArray[np.uint8]
    segment_ids: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, start: int, stop: int) -> Rows:
        """Rows `start` .. `stop - 1`, as views."""
        return Rows(
            inputs=self.inputs[start:stop],
            targets=self.targets[start:stop],
            weights=self.weights[start:stop],
            segment_ids=self.segment_ids[start:stop],
            positions=self.positions[start:stop],
        )
