"""Plain causal attention over one whole sequence: for training, and the tests' oracle."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from models.config import ModelConfig
from models.ops.attention.window import Window, layer_window
from models.ops.precision import matmul_precision

Cache = TypeVar("Cache")


def dense_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, *, sliding_window: Window = None
) -> jax.Array:
    """Causal softmax attention of one sequence with itself.

    Args:
        q: `[T, H, D]`, unscaled.
        k: `[T, K, D]`; each KV head serves `H / K` query heads in a row.
        v: `[T, K, D]`.
        sliding_window: if given, row t sees rows `t - sliding_window + 1 .. t` only.

    Returns:
        `[T, H, D]` in the dtype of `q`; scores and softmax are float32.
    """
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    precision = matmul_precision(q.dtype)
    grouped = q.reshape(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = jnp.einsum(
        "tkgd,skd->kgts", grouped, k, precision=precision, preferred_element_type=jnp.float32
    ) / math.sqrt(head_dim)
    rows = jnp.arange(num_rows)
    distance = rows[:, None] - rows[None, :]
    visible = distance >= 0
    if sliding_window is not None:
        visible &= distance < sliding_window
    weights = jax.nn.softmax(jnp.where(visible, scores, -jnp.inf), axis=-1)
    out = jnp.einsum("kgts,skd->tkgd", weights.astype(v.dtype), v, precision=precision)
    return out.reshape(num_rows, num_heads, head_dim).astype(q.dtype)


def dense_attend(
    config: ModelConfig,
) -> Callable[[jax.Array, jax.Array, jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]]:
    """An `attend` for `run_layers` that needs no cache and hands back the one it got.

    Args:
        config: says each layer's window.
    """

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, cache: Cache, layer_index: jax.Array
    ) -> tuple[jax.Array, Cache]:
        window = layer_window(config, layer_index)
        return dense_attention(q, k, v, sliding_window=window), cache

    return attend
