"""Normalisation of rows, computed in float32 whatever the activations' dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Scale each row to unit root mean square, then by `scale`.

    Args:
        x: `[..., E]`, any float dtype.
        scale: `[E]`.
        eps: added to the mean square, so that a row of zeros stays finite.

    Returns:
        `[..., E]` in the dtype of `x`; the arithmetic is float32.
    """
    wide = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    normed = wide * lax.rsqrt(mean_square + eps)
    return (normed * scale.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """Centre each row, scale it to unit variance, then by `scale`, and add `bias`.

    Args:
        x: `[..., E]`, any float dtype.
        scale: `[E]`.
        bias: `[E]`.
        eps: added to the variance.

    Returns:
        `[..., E]` in the dtype of `x`; the arithmetic is float32.
    """
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * lax.rsqrt(variance + eps)
    return (normed * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class RmsNorm(nnx.Module):
    """`rms_norm` with its scale `[size]`."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


class ZeroCentredRmsNorm(nnx.Module):
    """`rms_norm` that scales by `1 + scale [size]`, added in float32."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, 1.0 + self.scale[...].astype(jnp.float32), self.eps)


class LayerNorm(nnx.Module):
    """`layer_norm` with its scale and bias `[size]`."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.bias = nnx.Param(jnp.zeros((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return layer_norm(x, self.scale[...], self.bias[...], self.eps)
