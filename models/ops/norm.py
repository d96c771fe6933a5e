"""Root-mean-square normalisation, computed in float32 whatever the activations' dtype."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax


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
