"""Causal attention of whole rows that hold one or several packed segments: for training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from models.ops.attention.window import Window
from models.ops.precision import matmul_precision

MASKED = -1e30
"""Finite: a softmax over nothing but masked scores would be NaN, and so would its gradient."""
BLOCK_ROWS = 128
MAX_BLOCKS = 8
"""Longer rows get larger blocks: the program grows with their number."""
ATTENTION_OUTPUT = "attention_output"
"""Name, for rematerialisation, of what the backward pass needs beside q, k and v."""

_Kept: TypeAlias = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


class BlockMask(NamedTuple):
    """Which scores of a block of queries count, before any sliding window.

    For each block of t queries, of which the last may see s keys, and G query heads a KV head.
    """

    by_query: jax.Array
    """`bool[B, G * t, s]`"""
    by_key: jax.Array
    """`bool[B, s, G * t]`: the same, the other way round."""


def block_masks(segment_ids: jax.Array, groups: int) -> tuple[BlockMask, ...]:
    """What `packed_attention` takes, to be made once for all layers.

    Inside of a layer XLA would make them anew for every head, with a division for each score.

    Args:
        segment_ids: `int32[B, T]`; positions of a segment are neighbours.
        groups: G, query heads that share a KV head.
    """
    masks = []
    for rows in _blocks(segment_ids.shape[1]):
        is_earlier = np.arange(rows.start, rows.stop)[:, None] >= np.arange(rows.stop)
        is_own = segment_ids[:, rows, None] == segment_ids[:, None, : rows.stop]
        visible = jnp.tile(is_earlier & is_own, (1, groups, 1))
        masks.append(BlockMask(visible, visible.swapaxes(1, 2)))
    return tuple(masks)


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    masks: Sequence[BlockMask],
    *,
    sliding_window: Window = None,
) -> jax.Array:
    """Each position sees the earlier ones of its own segment, and itself.

    Queries are taken in blocks, each with the keys that it could see: scores above the
    diagonal, or left of the window, are for the most part not computed. The backward pass
    computes scores again instead of keeping them (Dao et al. 2022, FlashAttention, appendix B.2).

    Args:
        q: `[B, T, H, D]`, rotated, unscaled.
        k: `[B, T, K, D]`; each KV head serves `H / K` query heads in a row.
        v: `[B, T, K, D]`.
        masks: `block_masks` of the rows.
        sliding_window: if given, position t sees `t - sliding_window + 1 .. t` only.

    Returns:
        `[B, T, H, D]` in the dtype of `q`; scores and softmax are float32.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = (batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q = (q.reshape(grouped) / math.sqrt(head_dim)).astype(q.dtype).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    blocks = []
    for rows, mask in zip(_blocks(length), masks, strict=True):
        # A window that differs between layers is not known yet; then it only masks.
        first = max(0, rows.start - sliding_window + 1) if isinstance(sliding_window, int) else 0
        keys = slice(first, rows.stop)
        seen = _in_window(mask, rows, keys, grouped[3], sliding_window)
        block = q[:, :, :, rows]
        out = _attend(_flat(block), _flat(k[:, :, keys]), _flat(v[:, :, keys]), *seen)
        blocks.append(out.reshape(block.shape))
    out = jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


def _blocks(length: int) -> list[slice]:
    size = max(BLOCK_ROWS, -(-length // MAX_BLOCKS))
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _flat(x: jax.Array) -> jax.Array:
    """`[B, K, ..., D]` to `[B * K, rows, D]`."""
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])


def _in_window(
    mask: BlockMask, rows: slice, keys: slice, groups: int, sliding_window: Window
) -> BlockMask:
    """The part of a block's mask for `keys`, which are in the window."""
    by_query, by_key = mask.by_query[:, :, keys], mask.by_key[:, keys]
    if sliding_window is None:
        return BlockMask(by_query, by_key)
    row_index = np.tile(np.arange(rows.start, rows.stop), groups)
    key_index = np.arange(keys.start, keys.stop)
    return BlockMask(
        by_query & (row_index[:, None] - key_index < sliding_window),
        by_key & (row_index - key_index[:, None] < sliding_window),
    )


# Arrays of three axes, and a backward pass whose scores have keys as rows: with more axes, or the
# other way round, XLA copies the scores more often.
@jax.custom_vjp
def _attend(
    q: jax.Array, k: jax.Array, v: jax.Array, by_query: jax.Array, by_key: jax.Array
) -> jax.Array:
    """`q [B * K, G * t, D]`, `k`, `v [B * K, s, D]` and a `BlockMask` to `[B * K, G * t, D]`."""
    return _forward(q, k, v, by_query, by_key)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, by_query: jax.Array, by_key: jax.Array
) -> tuple[jax.Array, _Kept]:
    is_visible = _of_all_heads(by_query, q.shape[0])
    scores = jnp.where(is_visible, _products("ntd,nsd->nts", q, k), MASKED)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = (_products("nts,nsd->ntd", weights.astype(v.dtype), v) / total).astype(q.dtype)
    out = checkpoint_name(out, ATTENTION_OUTPUT)
    log_total = checkpoint_name((largest + jnp.log(total))[:, :, 0], ATTENTION_OUTPUT)
    return out, (q, k, v, by_key, out, log_total)


def _backward(kept: _Kept, grad: jax.Array) -> tuple[jax.Array | None, ...]:
    q, k, v, by_key, out, log_total = kept
    scores = _products("nsd,ntd->nst", k, q)
    weights = jnp.exp(scores - log_total[:, None, :])
    weights = jnp.where(_of_all_heads(by_key, q.shape[0]), weights, 0.0)
    grad_v = _products("nst,ntd->nsd", weights.astype(v.dtype), grad)
    # What a row's weights have in common falls out of the softmax's gradient.
    common = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)
    grad_weights = _products("nsd,ntd->nst", v, grad)
    grad_scores = (weights * (grad_weights - common[:, None, :])).astype(q.dtype)
    grad_q = _products("nst,nsd->ntd", grad_scores, k)
    grad_k = _products("nst,ntd->nsd", grad_scores, q)
    return grad_q.astype(q.dtype), grad_k.astype(k.dtype), grad_v.astype(v.dtype), None, None


_attend.defvjp(_forward, _backward)


def _of_all_heads(mask: jax.Array, num_flat: int) -> jax.Array:
    """`bool[B, ...]` to `bool[B * K, ...]`."""
    batch, *shape = mask.shape
    every = jnp.broadcast_to(mask[:, None], (batch, num_flat // batch, *shape))
    return every.reshape(num_flat, *shape)


def _products(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum of two arrays of one dtype, in float32."""
    precision = matmul_precision(left.dtype)
    return jnp.einsum(axes, left, right, precision=precision, preferred_element_type=jnp.float32)
