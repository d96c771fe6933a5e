"""Causal attention of whole rows that hold one or several packed segments: for training."""

from __future__ import annotations

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
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


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
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
        segment_ids: `int32[B, T]`; positions of a segment are neighbours.
        sliding_window: if given, position t sees `t - sliding_window + 1 .. t` only.

    Returns:
        `[B, T, H, D]` in the dtype of `q`; scores and softmax are float32.
    """
    batch, length, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[2]
    grouped = (batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    q = (q.reshape(grouped) / math.sqrt(head_dim)).astype(q.dtype).transpose(0, 2, 3, 1, 4)
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    size = max(BLOCK_ROWS, -(-length // MAX_BLOCKS))
    blocks = []
    for start in range(0, length, size):
        rows = slice(start, min(start + size, length))
        # A window that differs between layers is not known yet; then it only masks.
        first = max(0, start - sliding_window + 1) if isinstance(sliding_window, int) else 0
        keys = slice(first, rows.stop)
        visible = _visible(segment_ids, rows, keys, sliding_window)
        blocks.append(_attend(q[:, :, :, rows], k[:, :, keys], v[:, :, keys], visible))
    out = jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, num_heads, head_dim)


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array) -> jax.Array:
    """`q [B, K, G, t, D]`, `k`, `v [B, K, s, D]`, `visible [B, t, s]` to `[B, K, G, t, D]`."""
    return _forward(q, k, v, visible)[0]


def _forward(
    q: jax.Array, k: jax.Array, v: jax.Array, visible: jax.Array
) -> tuple[jax.Array, _Kept]:
    scores = jnp.where(visible[:, None, None], _products("bkgtd,bksd->bkgts", q, k), MASKED)
    largest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - largest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    out = (_products("bkgts,bksd->bkgtd", weights.astype(v.dtype), v) / total).astype(q.dtype)
    out = checkpoint_name(out, ATTENTION_OUTPUT)
    log_total = checkpoint_name(largest + jnp.log(total), ATTENTION_OUTPUT)
    return out, (q, k, v, visible, out, log_total)


def _backward(kept: _Kept, grad: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, visible, out, log_total = kept
    scores = _products("bkgtd,bksd->bkgts", q, k)
    weights = jnp.where(visible[:, None, None], jnp.exp(scores - log_total), 0.0)
    grad_v = _products("bkgts,bkgtd->bksd", weights.astype(v.dtype), grad)
    # What a row's weights have in common falls out of the softmax's gradient.
    common = jnp.sum(grad.astype(jnp.float32) * out.astype(jnp.float32), axis=-1, keepdims=True)
    grad_weights = _products("bkgtd,bksd->bkgts", grad, v)
    grad_scores = (weights * (grad_weights - common)).astype(q.dtype)
    grad_q = _products("bkgts,bksd->bkgtd", grad_scores, k)
    grad_k = _products("bkgts,bkgtd->bksd", grad_scores, q)
    return grad_q.astype(q.dtype), grad_k.astype(k.dtype), grad_v.astype(v.dtype), None


_attend.defvjp(_forward, _backward)


def _products(axes: str, left: jax.Array, right: jax.Array) -> jax.Array:
    """An einsum of two arrays of one dtype, in float32."""
    precision = matmul_precision(left.dtype)
    return jnp.einsum(axes, left, right, precision=precision, preferred_element_type=jnp.float32)


def _visible(segment_ids: jax.Array, rows: slice, keys: slice, sliding_window: Window) -> jax.Array:
    """`int32[B, T]` to `bool[B, t, s]`: whether a position of `rows` sees one of `keys`."""
    row_index = jnp.arange(rows.start, rows.stop)[:, None]
    distance = row_index - jnp.arange(keys.start, keys.stop)[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible & (segment_ids[:, rows, None] == segment_ids[:, None, keys])
