"""The KV pool: every layer's pages in one array, written in place.

Shape `[L, P + 1, page_size, 2, K, D]`: keys at index 0 and values at 1. The
last page is spare: padding rows write there and nobody reads it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.ops.attention.work import AttentionWork


def kv_pool_shape(config: ModelConfig, num_pages: int, page_size: int) -> tuple[int, ...]:
    return (
        config.num_layers,
        num_pages + 1,
        page_size,
        2,
        config.num_kv_heads,
        config.head_dim,
    )


def page_bytes(config: ModelConfig, page_size: int, dtype: np.dtype) -> int:
    """Bytes of one page over all layers."""
    shape = kv_pool_shape(config, 0, page_size)
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def write_rows(
    kv_pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer_index: jax.Array,
    work: AttentionWork,
) -> jax.Array:
    """Stores keys and values `[T, K, D]` of one layer's rows.

    Inside a donated step this is an in-place scatter of T rows; the pool is
    never copied.
    """
    num_layers, num_pages, page_size = kv_pool.shape[:3]
    page_ids = work.page_table[work.row_slots, work.row_positions // page_size]
    token_index = page_ids * page_size + work.row_positions % page_size
    flat = kv_pool.reshape(num_layers, num_pages * page_size, *kv_pool.shape[3:])
    rows = jnp.stack([k, v], axis=1).astype(kv_pool.dtype)
    return flat.at[layer_index, token_index].set(rows).reshape(kv_pool.shape)
