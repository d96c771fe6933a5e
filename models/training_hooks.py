"""TrainingHooks: what training adds to a family's layers, and serving leaves out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import jax

from models.lora import Lora

Branch: TypeAlias = Literal["attention", "mlp"]
BranchOutput: TypeAlias = Callable[[jax.Array, jax.Array, Branch], jax.Array]


def _unchanged(out: jax.Array, layer_index: jax.Array, branch: Branch) -> jax.Array:
    del layer_index, branch
    return out


@dataclass(frozen=True, slots=True)
class TrainingHooks:
    """An argument of a family's `run_layers`."""

    wrap_layer: Callable[[Callable[..., Any]], Callable[..., Any]] = lambda body: body
    """Goes around the scan's body, for rematerialisation."""
    branch_output: BranchOutput = _unchanged
    """`(out [T, E], int32 layer_index, branch) -> [T, E]`: a branch's output on its way to
    the residual stream, for dropout."""
    lora: Lora | None = None
    """Adapters, added to the projections that they name."""


NO_HOOKS = TrainingHooks()
