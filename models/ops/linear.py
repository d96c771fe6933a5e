"""A dense projection with its kernel as `[in, out]`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike


def matmul_precision(dtype: DTypeLike) -> lax.Precision:
    """Full float32 products for float32 arrays: GPUs would else round them to TF32."""
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else lax.Precision.DEFAULT


class Linear(nnx.Module):
    """`x @ kernel (+ bias)` in the kernel's dtype.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        use_bias: whether a bias `[out_features]` is added.
        dtype: dtype of the parameters.
        stddev: standard deviation of the kernel's initial values.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool,
        dtype: DTypeLike,
        stddev: float,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_features, out_features)
        self.kernel = nnx.Param(
            (stddev * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
        )
        # A missing bias is a missing attribute: the state then has no empty leaf.
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((out_features,), dtype))
        self.use_bias = use_bias

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        out = jnp.matmul(x, kernel, precision=matmul_precision(kernel.dtype))
        return out + self.bias[...] if self.use_bias else out
