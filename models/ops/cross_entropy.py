"""Cross-entropy over a large vocabulary whose logits are never kept.

The loss is a sum, so its gradient by the logits is known as soon as they are: the forward
pass turns each chunk of rows into its loss and its gradients by the hidden rows and the head,
and the logits `[chunk, V]` are gone before the next chunk. The backward pass only scales.
Nothing is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

Head: TypeAlias = Any
Logits: TypeAlias = Callable[[Head, jax.Array], jax.Array]

MAX_LOGITS_BYTES = 512 * 2**20
"""Of one chunk. Fewer chunks are faster: each adds its gradient to the whole head's."""


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def weighted_nll_sum(
    logits: Logits,
    head: Head,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    max_logits_bytes: int = MAX_LOGITS_BYTES,
) -> jax.Array:
    """Sum of `weights * -log softmax(logits(head, x))[targets]`.

    Args:
        logits: `(head, x [N, E]) -> float32[N, V]`.
        head: pytree of the parameters that `logits` uses.
        x: `[N, E]`.
        targets: `int32[N]`.
        weights: `float32[N]`; not differentiated.
        max_logits_bytes: of one chunk of rows.

    Returns:
        `float32[]`.
    """
    total = jnp.zeros((), jnp.float32)
    for rows in _chunks(logits, head, x, max_logits_bytes):
        total += _chunk_nll(logits(head, x[rows]), targets[rows], weights[rows])[0]
    return total


def _forward(
    logits: Logits,
    head: Head,
    x: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    max_logits_bytes: int,
) -> tuple[jax.Array, tuple[Head, jax.Array]]:
    """The loss, and as residuals its gradients by the head and by `x`."""
    total = jnp.zeros((), jnp.float32)
    head_gradient = None
    row_gradients = []
    for rows in _chunks(logits, head, x, max_logits_bytes):
        values, pull_back = jax.vjp(logits, head, x[rows])
        nll, values_gradient = _chunk_nll(values, targets[rows], weights[rows])
        total += nll
        for_head, for_rows = pull_back(values_gradient)
        row_gradients.append(for_rows)
        # Chunks are added in float32, whatever the dtype of the head.
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), for_head)
        head_gradient = (
            wide if head_gradient is None else jax.tree.map(jnp.add, head_gradient, wide)
        )
    head_gradient = jax.tree.map(lambda sum_, leaf: sum_.astype(leaf.dtype), head_gradient, head)
    return total, (head_gradient, jnp.concatenate(row_gradients))


def _backward(
    logits: Logits,
    max_logits_bytes: int,
    gradients: tuple[Head, jax.Array],
    scale: jax.Array,
) -> tuple[Head, jax.Array, None, None]:
    del logits, max_logits_bytes
    head, rows = jax.tree.map(lambda leaf: (scale * leaf).astype(leaf.dtype), gradients)
    return head, rows, None, None


weighted_nll_sum.defvjp(_forward, _backward)


def _chunk_nll(
    logits: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`logits float32[n, V]` to `(loss float32[], gradient by the logits float32[n, V])`."""
    largest = jnp.max(logits, axis=-1, keepdims=True)
    # Kept apart, or XLA computes each exponential twice: for the sum and for the gradient.
    powers = jax.lax.optimization_barrier(jnp.exp(logits - largest))
    total = jnp.sum(powers, axis=-1)
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
    loss = jnp.sum(weights * (jnp.log(total) + largest[:, 0] - target_logits))
    is_target = jnp.arange(logits.shape[1], dtype=targets.dtype) == targets[:, None]
    gradient = powers * (weights / total)[:, None] - jnp.where(is_target, weights[:, None], 0.0)
    return loss, gradient


def _chunks(logits: Logits, head: Head, x: jax.Array, max_logits_bytes: int) -> Iterator[slice]:
    """Equal ranges of rows (the last may be shorter) whose logits fit `max_logits_bytes`."""
    num_rows = x.shape[0]
    row_bytes = jax.eval_shape(logits, head, x[:1]).size * 4
    size = max(1, min(num_rows, max_logits_bytes // row_bytes))
    size = -(-num_rows // -(-num_rows // size))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
