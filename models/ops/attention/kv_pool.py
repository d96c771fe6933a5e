"""The KV pool: every layer's pages in one array, written in place.

Shape `[L, P + 1, page_size, 2, K, D]`: keys at index 0 and values at 1. The
last page is spare: padding rows write there and nobody reads it. With values in
8 bits the last axis has their scale, too, see `kv_quantization`.

bfloat16 values are stored as their bits (uint16): XLA's CPU backend computes in
float32 and would convert the whole pool around every scatter.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.ops.attention.kv_quantization import (
    FORMATS,
    SCALE_BYTES,
    dequantize,
    is_quantized,
    quantize,
)
from models.ops.attention.work import AttentionWork

KV_POOL_AXES = ("layers", "pages", None, None, "kv_heads", None)
"""Logical axes, see `models.sharding`."""


def kv_pool_shape(
    config: ModelConfig, num_pages: int, page_size: int, stored: DTypeLike
) -> tuple[int, ...]:
    """Of a pool whose dtype is `stored`."""
    return (
        config.num_layers,
        num_pages + 1,
        page_size,
        2,
        config.num_kv_heads,
        config.head_dim + (SCALE_BYTES if is_quantized(stored) else 0),
    )


def storage_dtype(dtype: DTypeLike, quantization: str | None = None) -> np.dtype:
    """The pool's dtype for values of `dtype`, or of a format of `kv_quantization`."""
    if quantization is not None:
        return FORMATS[quantization]
    return np.dtype(np.uint16) if jnp.dtype(dtype) == jnp.bfloat16 else jnp.dtype(dtype)


def values_dtype(stored: DTypeLike) -> np.dtype:
    """The dtype of values that are read from a pool whose own is `stored`."""
    if is_quantized(stored):
        return np.dtype(np.float32)
    return jnp.dtype(jnp.bfloat16 if stored == jnp.uint16 else stored)


def as_values(stored: jax.Array) -> jax.Array:
    """What was read from the pool, `[..., D]` floats."""
    if is_quantized(stored.dtype):
        return dequantize(stored)
    if stored.dtype == jnp.uint16:
        return lax.bitcast_convert_type(stored, jnp.bfloat16)
    return stored


def page_bytes(config: ModelConfig, page_size: int, stored: DTypeLike) -> int:
    """Bytes of one page over all layers, in a pool whose dtype is `stored`."""
    shape = kv_pool_shape(config, 0, page_size, stored)
    return int(np.prod(shape)) * np.dtype(stored).itemsize


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
    if token_index.shape[0] == 1:
        # XLA turns a scatter of one row into a slice update and copies the pool
        # around it, so a second row goes to the spare page.
        spare = jnp.full(1, (num_pages - 1) * page_size, token_index.dtype)
        token_index = jnp.concatenate([token_index, spare])
        k, v = jnp.repeat(k, 2, axis=0), jnp.repeat(v, 2, axis=0)
    flat = kv_pool.reshape(num_layers, num_pages * page_size, *kv_pool.shape[3:])
    rows = jnp.stack([k, v], axis=1)
    if is_quantized(kv_pool.dtype):
        rows = quantize(rows, kv_pool.dtype)
    elif kv_pool.dtype == jnp.uint16:
        rows = lax.bitcast_convert_type(rows.astype(jnp.bfloat16), jnp.uint16)
    written = flat.at[layer_index, token_index].set(rows).reshape(kv_pool.shape)
    # With one KV head XLA may choose an order of axes that differs in name alone, and copies
    # the pool to change it.
    in_place: jax.Array = with_layout_constraint(written, Layout(tuple(range(written.ndim))))
    return in_place
