"""Rotary position embedding in the half-split layout, with linear and llama3
scaling, or with given factors.

Dimension `i` of a head is paired with `i + D/2`. Checkpoints that pair neighbouring
dimensions are re-ordered when they are loaded, never here.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from models.config import ModelConfig, RopeScaling


def rope_frequencies(config: ModelConfig) -> npt.NDArray[np.float32]:
    """Angular frequencies of one head, `float32[D/2]`, in radians per position.

    Raises:
        ValueError: for a scaling kind that is not known.
    """
    half = config.head_dim // 2
    exponents = np.arange(half, dtype=np.float32) * np.float32(2) / np.float32(config.head_dim)
    base = np.float32(config.rope_theta)
    frequencies: npt.NDArray[np.float32] = (1.0 / base**exponents).astype(np.float32)
    if config.rope_scaling is None:
        return frequencies
    return _scaled(frequencies, config.rope_scaling)


def _scaled(frequencies: npt.NDArray[np.float32], scaling: RopeScaling) -> npt.NDArray[np.float32]:
    if scaling.kind == "factors":
        factors: npt.NDArray[np.float32] = np.array(scaling.factors, dtype=np.float32)
        divided: npt.NDArray[np.float32] = frequencies / factors
        return divided
    slowed: npt.NDArray[np.float32] = frequencies / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slowed
    if scaling.kind != "llama3":
        raise ValueError(
            f"rope_scaling: kind {scaling.kind!r} is not supported; "
            "use 'linear', 'llama3' or 'factors'"
        )
    # How often each pair turns within the length that the model was first trained on:
    # fast pairs keep their frequency, slow ones are slowed, those between are blended.
    turns = scaling.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    blended: npt.NDArray[np.float32] = (1.0 - kept_share) * slowed + kept_share * frequencies
    return blended


def rope_angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for `positions`.

    Args:
        config: gives the head size, base and scaling.
        positions: `int32[T]`.

    Returns:
        `(cos, sin)`, each `float32[T, D/2]`.
    """
    angles = positions.astype(jnp.float32)[:, None] * rope_frequencies(config)[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate each head's pairs by their row's angles.

    Args:
        x: `[T, heads, D]`.
        cos: `float32[T, D/2]`.
        sin: `float32[T, D/2]`.

    Returns:
        `[T, heads, D]` in the dtype of `x`; the arithmetic is float32.
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
    return rotated.astype(x.dtype)
