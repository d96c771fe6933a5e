"""`ragged_paged_attention` in plain XLA: the oracle, and what every platform has.

Online softmax over blocks of pages. Items are taken in small groups (static
shape, dynamic count); a group's loop ends at its longest context, so the cost
follows the real lengths and not `max_model_len`.

A row's bits do not depend on its neighbours: a block that is masked for a row
adds exact zeros and scales by exp(0) = 1, and every item of a group is a batch
entry of its own. They do depend on the item's shape (decode item or tile), so
a caller that wants equal bits from both hands in tiles only.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import lax

from models.ops.attention.kv_pool import as_values
from models.ops.attention.window import Window
from models.ops.attention.work import AttentionTiling, AttentionWork

MASKED = -1e30
"""Finite, so that a fully masked block leaves no NaN behind."""


@dataclass(frozen=True, slots=True)
class _Items:
    """One view: N items of up to `rows_per_item` rows, in groups."""

    starts: jax.Array
    num_rows: jax.Array
    num_items: jax.Array
    rows_per_item: int
    group_size: int


def ragged_paged_attention(
    q: jax.Array,
    kv_pool: jax.Array,
    layer_index: jax.Array,
    work: AttentionWork,
    *,
    tiling: AttentionTiling,
    sliding_window: Window,
) -> jax.Array:
    """Causal attention of `T` rows over their sequences' pages.

    Args:
        q: `[T, H, D]`, rotated, not scaled.
        kv_pool: see `kv_pool`, with this step's own keys and values already written.
        layer_index: int32 scalar.
        work: both row views, see `AttentionWork`.
        tiling: static sizes.
        sliding_window: a row at position p sees keys p - window + 1 .. p; see `Window`.

    Returns:
        `[T, H, D]` in q's dtype; zeros for padding rows. Softmax and sums are
        float32. Pages that a row may not see never influence it, NaN included.
    """
    num_rows = q.shape[0]
    out = jnp.zeros((num_rows + 1, *q.shape[1:]), q.dtype)
    tiles = _Items(
        work.tile_starts, work.tile_num_rows, work.num_tiles, tiling.tile_rows, tiling.tile_group
    )
    live = jnp.arange(work.decode_rows.shape[0]) < work.num_decodes
    decodes = _Items(
        work.decode_rows, live.astype(jnp.int32), work.num_decodes, 1, tiling.decode_group
    )
    for items in (decodes, tiles):
        out = _attend_items(q, kv_pool, layer_index, work, items, tiling, sliding_window, out)
    return out[:num_rows]


def _attend_items(
    q: jax.Array,
    kv_pool: jax.Array,
    layer_index: jax.Array,
    work: AttentionWork,
    items: _Items,
    tiling: AttentionTiling,
    sliding_window: Window,
    out: jax.Array,
) -> jax.Array:
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = kv_pool.shape[4]
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    grouped = grouped.astype(jnp.float32) * head_dim**-0.5
    row_offsets = jnp.arange(items.rows_per_item, dtype=jnp.int32)

    def one_group(group: jax.Array, out: jax.Array) -> jax.Array:
        first = group * items.group_size
        starts = lax.dynamic_slice_in_dim(items.starts, first, items.group_size)
        counts = lax.dynamic_slice_in_dim(items.num_rows, first, items.group_size)
        rows = jnp.minimum(starts[:, None] + row_offsets, num_rows - 1)
        result = _attend_group(
            grouped[rows],
            counts,
            work.row_positions[rows[:, 0]],
            work.page_table[work.row_slots[rows[:, 0]]],
            kv_pool,
            layer_index,
            tiling,
            sliding_window,
        )
        result = result.reshape(*rows.shape, num_heads, head_dim).astype(out.dtype)
        # Rows past an item's end go to the extra last row, which is cut off.
        target = jnp.where(row_offsets < counts[:, None], rows, num_rows)
        return out.at[target].set(result)

    num_groups = (items.num_items + items.group_size - 1) // items.group_size
    attended: jax.Array = lax.fori_loop(0, num_groups, one_group, out)
    return attended


def _attend_group(
    q: jax.Array,
    num_rows: jax.Array,
    first_positions: jax.Array,
    page_rows: jax.Array,
    kv_pool: jax.Array,
    layer_index: jax.Array,
    tiling: AttentionTiling,
    sliding_window: Window,
) -> jax.Array:
    """Online softmax of W items `q [W, R, K, G, D]` (float32, scaled) over
    their pages `page_rows [W, pages]`; returns `[W, R, K, G, D]`."""
    width, rows, num_kv_heads, group, head_dim = q.shape
    block_tokens = tiling.block_tokens
    # A page is one row, so that no axis of its inside gives the pool another layout.
    pages = kv_pool.reshape(kv_pool.shape[0] * kv_pool.shape[1], -1)
    layer_offset = layer_index * kv_pool.shape[1]
    # [W, K, R * G, D]: one small matrix product per item and KV head.
    q = q.transpose(0, 2, 1, 3, 4).reshape(width, num_kv_heads, rows * group, head_dim)
    row_positions = first_positions[:, None] + jnp.arange(rows, dtype=jnp.int32)
    last_positions = first_positions + num_rows - 1
    if sliding_window is None:
        first_blocks = jnp.zeros_like(first_positions)
    else:
        first_blocks = jnp.maximum(first_positions - sliding_window + 1, 0) // block_tokens
    # An item without rows has last_position = first_position - 1 and is masked.
    num_blocks = jnp.where(num_rows > 0, last_positions // block_tokens + 1 - first_blocks, 0)

    def one_block(
        carry: tuple[jax.Array, jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
        step, peak, total, acc = carry
        block = first_blocks + step
        columns = block[:, None] * tiling.pages_per_block + jnp.arange(tiling.pages_per_block)
        # Items that are done read their last columns again, fully masked.
        page_ids = jnp.take_along_axis(page_rows, columns, axis=1, mode="clip")
        kv = pages[layer_offset + page_ids]
        kv = as_values(kv.reshape(width, block_tokens, *kv_pool.shape[3:]))
        key_positions = block[:, None] * block_tokens + jnp.arange(block_tokens)
        held = key_positions <= last_positions[:, None]
        visible = key_positions[:, None, :] <= row_positions[:, :, None]
        visible &= held[:, None, :]
        if sliding_window is not None:
            visible &= key_positions[:, None, :] > row_positions[:, :, None] - sliding_window
        visible = jnp.repeat(visible, group, axis=1)[:, None]  # [W, 1, R * G, block]
        scores = jnp.einsum(
            "wkrd,wtkd->wkrt",
            q,
            kv[:, :, 0].astype(jnp.float32),
            precision=lax.Precision.HIGHEST,
        )
        scores = jnp.where(visible, scores, MASKED)
        new_peak = jnp.maximum(peak, scores.max(-1))
        weights = jnp.where(visible, jnp.exp(scores - new_peak[..., None]), 0.0)
        # 0 * NaN is NaN: values that no row may see are cleared, not weighted.
        values = jnp.where(held[:, :, None, None], kv[:, :, 1].astype(jnp.float32), 0.0)
        shrink = jnp.exp(peak - new_peak)
        update = jnp.einsum("wkrt,wtkd->wkrd", weights, values, precision=lax.Precision.HIGHEST)
        return (
            step + 1,
            new_peak,
            total * shrink + weights.sum(-1),
            acc * shrink[..., None] + update,
        )

    shape = (width, num_kv_heads, rows * group)
    start = (
        jnp.zeros((), jnp.int32),
        jnp.full(shape, MASKED, jnp.float32),
        jnp.zeros(shape, jnp.float32),
        jnp.zeros((*shape, head_dim), jnp.float32),
    )
    most_blocks = num_blocks.max()
    _, _, total, acc = lax.while_loop(lambda carry: carry[0] < most_blocks, one_block, start)
    out = acc / jnp.maximum(total, 1e-30)[..., None]
    out = out.reshape(width, num_kv_heads, rows, group, head_dim)
    return out.transpose(0, 2, 1, 3, 4)
