"""Rotary position embedding in the half-split layout, with linear, llama3 and longrope
scaling, or with given factors.

Dimension `i` of a head is paired with `i + R/2`, R of the head's D dimensions being rotated.
Checkpoints that pair neighbouring dimensions are re-ordered when they are loaded, never here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from models.config import ModelConfig, RopeScaling

Rope: TypeAlias = tuple[jax.Array, jax.Array]
"""Cosines and sines of a layer's rows, each `float32[T, R/2]`."""


def rope_frequencies(config: ModelConfig, theta: float | None = None) -> npt.NDArray[np.float32]:
    """Angular frequencies of one head, `float32[R/2]`, in radians per position.

    Args:
        config: gives the head size, base and scaling.
        theta: another base, which is not scaled.

    Raises:
        ValueError: for a scaling kind that is not known.
    """
    rotary_dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
    size = np.float32(max(rotary_dim, 1))
    exponents = np.arange(rotary_dim // 2, dtype=np.float32) * np.float32(2) / size
    base = np.float32(config.rope_theta if theta is None else theta)
    frequencies: npt.NDArray[np.float32] = (1.0 / base**exponents).astype(np.float32)
    if config.rope_scaling is None or theta is not None:
        return frequencies
    return _scaled(frequencies, config.rope_scaling, config.max_position_embeddings)


def _scaled(
    frequencies: npt.NDArray[np.float32], scaling: RopeScaling, max_positions: int
) -> npt.NDArray[np.float32]:
    if scaling.kind in ("factors", "longrope"):
        is_long = scaling.kind == "longrope" and (
            max_positions > scaling.original_max_position_embeddings
        )
        chosen = scaling.long_factors if is_long else scaling.factors
        factors: npt.NDArray[np.float32] = np.array(chosen, dtype=np.float32)
        divided: npt.NDArray[np.float32] = frequencies / factors
        return divided
    slowed: npt.NDArray[np.float32] = frequencies / np.float32(scaling.factor)
    if scaling.kind == "linear":
        return slowed
    if scaling.kind != "llama3":
        raise ValueError(
            f"rope_scaling: kind {scaling.kind!r} is not supported; "
            "use 'linear', 'llama3', 'factors' or 'longrope'"
        )
    # How often each pair turns within the length that the model was first trained on:
    # fast pairs keep their frequency, slow ones are slowed, those between are blended.
    turns = scaling.original_max_position_embeddings * frequencies / np.float32(2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept_share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    blended: npt.NDArray[np.float32] = (1.0 - kept_share) * slowed + kept_share * frequencies
    return blended


def rope_angles(config: ModelConfig, positions: jax.Array, theta: float | None = None) -> Rope:
    """Cosines and sines for `positions`.

    Args:
        config: gives the head size, base and scaling.
        positions: `int32[T]`.
        theta: another base, which is not scaled.
    """
    angles = positions.astype(jnp.float32)[:, None] * rope_frequencies(config, theta)[None, :]
    scaling = config.rope_scaling
    factor = 1.0 if scaling is None or theta is not None else scaling.attention_factor
    if factor == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def layer_rope(config: ModelConfig, positions: jax.Array) -> Callable[[jax.Array], Rope]:
    """The rows' cosines and sines as a function of the layer's index.

    All angles are computed here, outside the scan over layers; the function picks.
    """
    angles = rope_angles(config, positions)
    if config.rope_local_theta is None:
        return lambda _: angles
    local = rope_angles(config, positions, config.rope_local_theta)
    windows = config.layer_windows or (config.sliding_window,) * config.num_layers
    is_local = jnp.asarray([window is not None for window in windows])

    def pick(layer_index: jax.Array) -> Rope:
        chosen = is_local[layer_index]
        return jnp.where(chosen, local[0], angles[0]), jnp.where(chosen, local[1], angles[1])

    return pick


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate the pairs among each head's first R dimensions by their row's angles.

    Args:
        x: `[T, heads, D]`.
        cos: `float32[T, R/2]`.
        sin: `float32[T, R/2]`.

    Returns:
        `[T, heads, D]` in the dtype of `x`; the arithmetic is float32.
    """
    half = cos.shape[-1]
    if half == 0:
        return x
    wide = x.astype(jnp.float32)
    first, second, rest = wide[..., :half], wide[..., half : 2 * half], wide[..., 2 * half :]
    cos, sin = cos[:, None, :], sin[:, None, :]
    rotated = (first * cos - second * sin, second * cos + first * sin)
    parts = rotated if rest.shape[-1] == 0 else (*rotated, rest)
    return jnp.concatenate(parts, axis=-1).astype(x.dtype)
