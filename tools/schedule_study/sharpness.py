"""How much the loss rises close by: the sharpness of Keskar et al. (arXiv 1609.04836)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tools.schedule_study.task import Task

EPSILON = 1e-4
STEP_SIZE = 1e-3
NUM_STEPS = 1000


def sharpness(task: Task, params: Any) -> jax.Array:
    """100 (highest loss - loss) / (1 + loss), on the train set in a box around `params`.

    The box has half-width `EPSILON` (|parameter| + 1) along each coordinate. Its
    highest loss is looked for by projected gradient ascent, as the authors of Knee
    do: the highest of all its steps is taken.

    Args:
        task: With a `train_set`.
        params: A trained network's.

    Returns:
        float32[], at least 0.
    """
    limits = jax.tree.map(lambda param: EPSILON * (jnp.abs(param) + 1.0), params)
    loss = task.loss(params, task.train_set)

    def ascend(carry: tuple[Any, jax.Array], _: None) -> tuple[tuple[Any, jax.Array], None]:
        offsets, highest = carry
        at = jax.tree.map(jnp.add, params, offsets)
        value, grads = jax.value_and_grad(task.loss)(at, task.train_set)
        moved = jax.tree.map(
            lambda offset, grad, limit: jnp.clip(offset + STEP_SIZE * grad, -limit, limit),
            offsets,
            grads,
            limits,
        )
        return (moved, jnp.maximum(highest, value)), None

    start = jax.tree.map(jnp.zeros_like, params)
    (offsets, highest), _ = jax.lax.scan(ascend, (start, loss), None, length=NUM_STEPS)
    last = task.loss(jax.tree.map(jnp.add, params, offsets), task.train_set)
    return 100.0 * (jnp.maximum(highest, last) - loss) / (1.0 + loss)
