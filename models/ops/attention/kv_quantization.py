"""Keys and values in 8 bits: each token's head has a scale of its own, right behind its values.

So a page stays one piece of memory, and a row's numbers depend on nothing but the row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

FORMATS = {"int8": np.dtype(np.int8), "fp8_e4m3": np.dtype(np.uint8)}
"""Format -> dtype of the pool: int8 values, or the bits of float8_e4m3fn ones."""
SCALE_BYTES = 4
"""Of a float32."""

_MAX_INT8 = 127.0
_MAX_FP8 = float(jnp.finfo(jnp.float8_e4m3fn).max)


def is_quantized(stored: DTypeLike) -> bool:
    """Whether a pool of this dtype holds values with scales."""
    return np.dtype(stored) in FORMATS.values()


def quantize(x: jax.Array, stored: DTypeLike) -> jax.Array:
    """`[..., D]` floats to `[..., D + SCALE_BYTES]` of the dtype `stored`.

    The largest magnitude of a head becomes the largest code; NaN and infinity make all of the
    head NaN.
    """
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(-1)
    scale = largest / (_MAX_INT8 if np.dtype(stored) == np.int8 else _MAX_FP8)
    scaled = x / jnp.where(scale > 0, scale, 1)[..., None]
    if np.dtype(stored) == np.int8:
        codes = jnp.clip(jnp.round(scaled), -_MAX_INT8, _MAX_INT8).astype(jnp.int8)
    else:
        codes = lax.bitcast_convert_type(scaled.astype(jnp.float8_e4m3fn), jnp.uint8)
    # An infinite scale makes 0 * inf of its codes; one that is NaN makes NaN.
    return jnp.concatenate([codes, lax.bitcast_convert_type(scale, np.dtype(stored))], axis=-1)


def dequantize(stored: jax.Array) -> jax.Array:
    """What `quantize` made, as float32 `[..., D]`."""
    head_dim = stored.shape[-1] - SCALE_BYTES
    codes, scale = stored[..., :head_dim], stored[..., head_dim:]
    if stored.dtype == jnp.uint8:
        codes = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    return codes.astype(jnp.float32) * lax.bitcast_convert_type(scale, jnp.float32)[..., None]
