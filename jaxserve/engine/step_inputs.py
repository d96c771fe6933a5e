"""StepInputs: a StepPlan as the one int32 vector that a compiled step takes.

One vector is one host-to-device transfer and one argument. `StepLayout` says
where each part stands; the host writes through NumPy views and the step reads
static slices of the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import jax
import numpy as np
from jax import lax

from jaxserve.engine.plan import TAKE_FROM_SLOT, StepPlan
from jaxserve.engine.sampling_params import MAX_TOP_LOGPROBS
from models.ops.attention.work import AttentionTiling, AttentionWork

PADDING_TARGET = -2
"""Sample target of a padding row."""


@dataclass(frozen=True)
class StepLayout:
    """Static shape of one bucket's inputs and outputs."""

    num_rows: int
    """T"""
    num_slots: int
    """S"""
    num_sample_rows: int
    """Rows through the LM head."""
    page_table_width: int
    num_pages: int
    vocab_size: int
    tiling: AttentionTiling
    decodes_as_tiles: bool
    """One attention shape for every row, so that a row's bits do not depend
    on whether it was decoded or recomputed."""

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        tiles = self.tiling.max_tiles(self.num_rows, self.num_slots)
        return {
            "counts": (2,),  # num_decodes, num_tiles
            "tokens": (self.num_rows,),
            "row_slots": (self.num_rows,),
            "row_positions": (self.num_rows,),
            "decode_rows": (self.tiling.max_decodes(self.num_rows, self.num_slots),),
            "tile_starts": (tiles,),
            "tile_num_rows": (tiles,),
            "sample_rows": (self.num_sample_rows,),
            "sample_targets": (self.num_sample_rows,),
            "page_table": (self.num_slots + 1, self.page_table_width),
        }

    @cached_property
    def slices(self) -> Mapping[str, tuple[int, int]]:
        """Start and end of each part in the vector."""
        slices, start = {}, 0
        for name, shape in self.shapes.items():
            end = start + int(np.prod(shape))
            slices[name] = (start, end)
            start = end
        return slices

    @property
    def size(self) -> int:
        return max(end for _, end in self.slices.values())

    @property
    def num_top(self) -> int:
        return min(MAX_TOP_LOGPROBS, self.vocab_size)

    def unpack(self, vector: jax.Array) -> dict[str, jax.Array]:
        """Inside the step: the named parts of the vector `[size]`."""
        return {
            name: lax.slice_in_dim(vector, *self.slices[name]).reshape(shape)
            for name, shape in self.shapes.items()
        }

    def attention_work(self, parts: Mapping[str, jax.Array]) -> AttentionWork:
        return AttentionWork(
            page_table=parts["page_table"],
            row_slots=parts["row_slots"],
            row_positions=parts["row_positions"],
            decode_rows=parts["decode_rows"],
            num_decodes=parts["counts"][0],
            tile_starts=parts["tile_starts"],
            tile_num_rows=parts["tile_num_rows"],
            num_tiles=parts["counts"][1],
        )

    def pack(self, plan: StepPlan, page_table: np.ndarray) -> np.ndarray:
        """A fresh int32 `[size]` for this plan.

        Fresh each time, because a CPU device may read the host's memory in
        place while the step runs.

        Args:
            plan: fits this bucket.
            page_table: int32 `[S + 1, page_table_width]`, already updated with
                the plan's new pages; it is copied.
        """
        vector = np.zeros(self.size, np.int32)
        views = {
            name: vector[start:end].reshape(self.shapes[name])
            for name, (start, end) in self.slices.items()
        }
        views["row_slots"][:] = self.num_slots
        self._pack_rows(plan, views)
        self._pack_items(plan, views)
        self._pack_samples(plan, views)
        views["page_table"][:] = page_table
        return vector

    def _pack_rows(self, plan: StepPlan, views: Mapping[str, np.ndarray]) -> None:
        num_decodes = len(plan.decodes)
        views["tokens"][:num_decodes] = TAKE_FROM_SLOT
        views["row_slots"][:num_decodes] = plan.decodes.slots
        views["row_positions"][:num_decodes] = plan.decodes.positions
        row = num_decodes
        for chunk in plan.prefills:
            end = row + chunk.num_tokens
            views["tokens"][row:end] = chunk.token_ids
            views["row_slots"][row:end] = chunk.slot
            views["row_positions"][row:end] = np.arange(chunk.start, chunk.start + chunk.num_tokens)
            row = end

    def _pack_samples(self, plan: StepPlan, views: Mapping[str, np.ndarray]) -> None:
        views["sample_targets"][:] = PADDING_TARGET
        num_decodes = len(plan.decodes)
        views["sample_rows"][:num_decodes] = np.arange(num_decodes)
        views["sample_targets"][:num_decodes] = -1
        for index, sample in enumerate(plan.prefill_sample_rows(), start=num_decodes):
            views["sample_rows"][index] = sample.row
            views["sample_targets"][index] = sample.target

    def _pack_items(self, plan: StepPlan, views: Mapping[str, np.ndarray]) -> None:
        tile_rows = self.tiling.tile_rows
        tiles: list[tuple[int, int, int]] = []  # last position, first row, rows
        num_decodes = len(plan.decodes)
        views["decode_rows"][:] = self.num_rows
        if self.decodes_as_tiles:
            tiles = [(position, row, 1) for row, position in enumerate(plan.decodes.positions)]
        elif num_decodes:
            positions = views["row_positions"][:num_decodes]
            views["decode_rows"][:num_decodes] = np.argsort(-positions, kind="stable")
            views["counts"][0] = num_decodes
        row = num_decodes
        for chunk in plan.prefills:
            for offset in range(0, chunk.num_tokens, tile_rows):
                count = min(tile_rows, chunk.num_tokens - offset)
                tiles.append((chunk.start + offset + count - 1, row + offset, count))
            row += chunk.num_tokens
        tiles.sort(key=lambda tile: -tile[0])
        views["tile_starts"][:] = self.num_rows
        views["counts"][1] = len(tiles)
        if tiles:
            _, starts, counts = zip(*tiles, strict=True)
            views["tile_starts"][: len(tiles)] = starts
            views["tile_num_rows"][: len(tiles)] = counts
