"""Which keys a layer sees: its sliding window, as a value of the layer scan."""

from __future__ import annotations

from typing import TypeAlias

import jax
import jax.numpy as jnp

from models.config import ModelConfig

Window: TypeAlias = int | jax.Array | None
"""A row at position p sees keys p - window + 1 .. p; None: all of 0 .. p. An int is part of
the compiled program, an int32 scalar is one of its values."""

WHOLE_CONTEXT = 2**30
"""The window of a layer that sees everything, where others of the model do not: longer than
any context, and still an int32 when a position is added."""


def layer_window(config: ModelConfig, layer_index: jax.Array) -> Window:
    """The window of one layer.

    Static where all layers are alike, so that nothing is computed for it.

    Args:
        config: the model's config.
        layer_index: int32 scalar, as `attend` gets it.
    """
    if not config.layer_windows:
        return config.sliding_window
    windows = [WHOLE_CONTEXT if window is None else window for window in config.layer_windows]
    return jnp.asarray(windows, jnp.int32)[layer_index]
