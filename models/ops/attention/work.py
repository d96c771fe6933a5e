"""What one step asks of attention: the work list and its static tiling."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax


@dataclass(frozen=True, slots=True)
class AttentionTiling:
    """Static sizes; part of the compiled program, never of its inputs."""

    page_size: int
    """Tokens of a page."""
    pages_per_block: int = 4
    """Pages read at once; the loop over a sequence advances by this many."""
    decode_group: int = 8
    """Decode items that advance together."""
    tile_rows: int = 16
    """Rows of a prefill tile, all of one sequence."""
    tile_group: int = 4
    """Tiles that advance together."""

    @property
    def block_tokens(self) -> int:
        return self.page_size * self.pages_per_block

    def max_tiles(self, num_rows: int, num_slots: int) -> int:
        """Most tiles that `num_rows` rows of at most `num_slots` chunks need,
        rounded up to whole groups."""
        tiles = min(num_rows, num_rows // self.tile_rows + num_slots)
        return _round_up(tiles, self.tile_group)

    def max_decodes(self, num_rows: int, num_slots: int) -> int:
        return _round_up(min(num_rows, num_slots), self.decode_group)

    def page_table_width(self, max_pages_per_seq: int) -> int:
        """Columns of the page table: whole blocks, so that no read is cut."""
        return _round_up(max_pages_per_seq, self.pages_per_block)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "page_table",
        "row_slots",
        "row_positions",
        "decode_rows",
        "num_decodes",
        "tile_starts",
        "tile_num_rows",
        "num_tiles",
    ],
    meta_fields=[],
)
@dataclass(frozen=True, slots=True)
class AttentionWork:
    """Both views of a step's rows: decode items (one row each) and prefill
    tiles (up to `tile_rows` consecutive rows of one sequence).

    Items and tiles are sorted longest context first, so that the ones that
    advance together have similar lengths. Every live row is in exactly one
    item or tile; padding rows are in none and get zeros. All int32.
    """

    page_table: jax.Array
    """[S + 1, W]: page ids per slot; row S belongs to padding rows and names
    only the spare page. W is a multiple of `pages_per_block`."""
    row_slots: jax.Array
    """[T]: S for padding rows."""
    row_positions: jax.Array
    """[T]: absolute positions."""
    decode_rows: jax.Array
    """[ND]: row of each decode item; T past the last."""
    num_decodes: jax.Array
    """[]"""
    tile_starts: jax.Array
    """[NT]: first row of each tile; T past the last."""
    tile_num_rows: jax.Array
    """[NT]: 0 past the last."""
    num_tiles: jax.Array
    """[]"""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
