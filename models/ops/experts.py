"""Top-k routing over experts whose rows are multiplied in one ragged product."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from models.ops.precision import matmul_precision


def route(
    router_logits: jax.Array, num_chosen: int, *, normalize: bool
) -> tuple[jax.Array, jax.Array]:
    """Choose experts for each row.

    Args:
        router_logits: `[T, X]` for X experts.
        num_chosen: k, experts a row.
        normalize: scale a row's weights to sum to one.

    Returns:
        `(expert_ids int32[T, k], weights float32[T, k])`: the most probable experts and their
        softmax probabilities over all X.
    """
    probabilities = jax.nn.softmax(router_logits.astype(jnp.float32), axis=-1)
    weights, expert_ids = lax.top_k(probabilities, num_chosen)
    if normalize:
        weights = weights / weights.sum(axis=-1, keepdims=True)
    return expert_ids, weights


def expert_matmul(x: jax.Array, kernels: jax.Array, group_sizes: jax.Array) -> jax.Array:
    """Each group of rows by its expert's matrix.

    Args:
        x: `[M, in]`, sorted by expert.
        kernels: `[X, in, out]`.
        group_sizes: `int32[X]`, rows of each expert; they sum to M.

    Returns:
        `[M, out]`.
    """
    return lax.ragged_dot(x, kernels, group_sizes, precision=matmul_precision(kernels.dtype))
