"""Which `ragged_paged_attention` a platform runs: chosen once, at start-up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax

from models.ops.attention import reference


@dataclass(frozen=True, slots=True)
class AttentionImplementation:
    name: str
    platforms: tuple[str, ...]
    """JAX platform names on which it runs."""
    call: Callable[..., jax.Array]
    """The signature of `reference.ragged_paged_attention`."""


IMPLEMENTATIONS = (
    AttentionImplementation("reference", ("cpu", "gpu", "tpu"), reference.ragged_paged_attention),
)
"""Best first within a platform."""


def select(name: str, platform: str) -> AttentionImplementation:
    """Looks up `name`, or the platform's best for "auto".

    Raises ValueError that lists what the platform has.
    """
    candidates = [impl for impl in IMPLEMENTATIONS if platform in impl.platforms]
    if name == "auto" and candidates:
        return candidates[0]
    for implementation in candidates:
        if implementation.name == name:
            return implementation
    names = ", ".join(["auto", *(impl.name for impl in candidates)])
    raise ValueError(f"--attention {name!r} is not available on {platform}; choose from: {names}")
