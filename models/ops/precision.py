"""How exact a matrix product is."""

from __future__ import annotations

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike


def matmul_precision(dtype: DTypeLike) -> lax.Precision:
    """Full float32 products for float32 arrays: GPUs would else round them to TF32."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT
