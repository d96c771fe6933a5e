"""The MLP activations, by the name that `ModelConfig.hidden_act` holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import jax

ACTIVATIONS: Mapping[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}
"""Functions from `[..., F]` to `[..., F]`, element by element."""
