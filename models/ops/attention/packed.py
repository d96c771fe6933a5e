"""Causal attention of whole rows that hold one or several packed segments: for training."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from models.ops.attention.window import Window
from models.ops.linear import matmul_precision

MASKED = -1e30
"""Finite: a softmax over nothing but masked scores would be NaN, and so would its gradient."""


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    *,
    sliding_window: Window = None,
) -> jax.Array:
    """Each position sees the earlier ones of its own segment, and itself.

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
    precision = matmul_precision(q.dtype)
    grouped = q.reshape(batch, length, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum(
        "btkgd,bskd->bkgts", grouped, k, precision=precision, preferred_element_type=jnp.float32
    ) / math.sqrt(head_dim)
    visible = visible_positions(segment_ids, sliding_window)[:, None, None]
    weights = jax.nn.softmax(jnp.where(visible, scores, MASKED), axis=-1)
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v, precision=precision)
    return out.reshape(batch, length, num_heads, head_dim).astype(q.dtype)


def visible_positions(segment_ids: jax.Array, sliding_window: Window) -> jax.Array:
    """`int32[B, T]` to `bool[B, T, T]`: whether position t (axis 1) sees s (axis 2)."""
    index = jnp.arange(segment_ids.shape[1])
    distance = index[:, None] - index[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    return visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
