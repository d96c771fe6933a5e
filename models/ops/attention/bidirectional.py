"""Attention of whole texts with themselves, in both directions: for encoders."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from models.ops.precision import matmul_precision

MASKED = -1e30
"""Finite, so that a text without tokens leaves no NaN behind."""


def bidirectional_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    """Every position sees the first `num_tokens` of its own text.

    Args:
        q: `[B, T, H, D]`, unscaled.
        k: `[B, T, K, D]`; each KV head serves `H / K` query heads in a row.
        v: `[B, T, K, D]`.
        num_tokens: `int32[B]`.

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
    visible = jnp.arange(length) < num_tokens[:, None]
    weights = jax.nn.softmax(jnp.where(visible[:, None, None, None], scores, MASKED), axis=-1)
    out = jnp.einsum("bkgts,bskd->btkgd", weights.astype(v.dtype), v, precision=precision)
    return out.reshape(q.shape).astype(q.dtype)
