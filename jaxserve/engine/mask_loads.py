"""MaskLoads: the masks of constrained requests on their way into the slots.

A program of its own, so that a step without constrained requests carries nothing for them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jax import lax

from jaxserve.engine.plan import MaskLoad
from jaxserve.engine.slots import num_mask_words

MAX_MASKS_PER_LOAD = 8


@dataclass(frozen=True, slots=True)
class MaskLoadLayout:
    """Where slots and masks stand in the int32 vector of one call, which has room for
    `num_masks`."""

    num_slots: int
    vocab_size: int

    @property
    def num_masks(self) -> int:
        return min(self.num_slots, MAX_MASKS_PER_LOAD)

    @property
    def num_words(self) -> int:
        return num_mask_words(self.vocab_size)

    @property
    def size(self) -> int:
        return self.num_masks * (1 + self.num_words)

    def pack(self, loads: Sequence[MaskLoad]) -> np.ndarray:
        """int32 `[size]`: the slots, then the masks. Where there is none, the slot does not
        exist, and the mask is dropped."""
        vector = np.zeros(self.size, np.int32)
        slots, words = vector[: self.num_masks], vector[self.num_masks :]
        slots[:] = self.num_slots
        slots[: len(loads)] = [load.slot for load in loads]
        masks = words.view("<u4").reshape(self.num_masks, self.num_words)
        for row, load in enumerate(loads):
            masks[row] = np.frombuffer(load.words, "<u4")
        return vector

    def vectors(self, loads: Sequence[MaskLoad]) -> Iterator[np.ndarray]:
        """One `pack` for each call that the loads take."""
        for start in range(0, len(loads), self.num_masks):
            yield self.pack(loads[start : start + self.num_masks])


def load_masks(allowed_mask: jax.Array, vector: jax.Array, *, layout: MaskLoadLayout) -> jax.Array:
    """Writes masks into `SlotState.allowed_mask`, which is donated, from `layout.pack(loads)`."""
    slots = lax.slice_in_dim(vector, 0, layout.num_masks)
    words = lax.slice_in_dim(vector, layout.num_masks, layout.size)
    masks = lax.bitcast_convert_type(words, allowed_mask.dtype)
    masks = masks.reshape(layout.num_masks, layout.num_words)
    return allowed_mask.at[slots].set(masks, mode="drop")
