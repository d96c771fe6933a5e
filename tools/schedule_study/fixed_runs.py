"""Runs whose optimizer needs no probes: many at once, in one program."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tools.schedule_study.task import Task

CHUNK = 60
"""Updates that one compiled call makes; every length of a run is a multiple."""


@dataclass(frozen=True)
class Runs:
    """How runs ended that were trained side by side.

    Attributes:
        held_out_losses: float32[runs], at the end.
        train_losses: float32[runs, T / CHUNK], means over `CHUNK` updates each.
        params: Parameters at the end, each leaf with a leading dimension of runs.
    """

    held_out_losses: np.ndarray
    train_losses: np.ndarray
    params: Any


def train_side_by_side(
    task: Task,
    optimizer: optax.GradientTransformation,
    rates: Sequence[optax.Schedule],
    seeds: Sequence[int],
    num_steps: int,
) -> Runs:
    """Trains one run for each pair of a rate and a seed.

    Args:
        task: What to train.
        optimizer: Its updates are multiplied by the rate: they are to go downhill.
        rates: Count -> rate, one a run.
        seeds: One a run; a seed fixes the start and the batches.
        num_steps: Updates of each run, a multiple of `CHUNK`.
    """
    if num_steps % CHUNK:
        raise ValueError(f"num_steps is {num_steps}; it must be a multiple of {CHUNK}")
    counts = jnp.arange(num_steps)
    table = jnp.stack([jnp.broadcast_to(rate(counts), (num_steps,)) for rate in rates], axis=1)
    numbers = jnp.asarray(seeds, jnp.int32)
    params = jax.vmap(task.initial_params)(numbers)
    full = _with_loss(optimizer)
    state = jax.vmap(full.init)(params)
    losses = []
    for start in range(0, num_steps, CHUNK):
        rows = table[start : start + CHUNK]
        params, state, loss = _train_chunk(task, full, params, state, numbers, rows, start)
        losses.append(loss)
    finals = _held_out_losses(task, params)
    return Runs(np.asarray(finals), np.stack(jax.device_get(losses), axis=1), params)


@cache
def _with_loss(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    return optax.with_extra_args_support(optimizer)


@partial(jax.jit, static_argnums=0)
def _held_out_losses(task: Task, params: Any) -> jax.Array:
    """One run after the other: the held-out batch is large."""
    losses: jax.Array = jax.lax.map(lambda own: task.loss(own, task.held_out), params)
    return losses


@partial(jax.jit, static_argnums=(0, 1))
def _train_chunk(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    params: optax.Params,
    state: optax.OptState,
    seeds: jax.Array,
    rates: jax.Array,
    start: jax.Array,
) -> tuple[optax.Params, optax.OptState, jax.Array]:
    """`CHUNK` updates of all runs; rates: float32[CHUNK, runs]. The losses are float32[runs]."""

    def one(
        params: optax.Params,
        state: optax.OptState,
        seed: jax.Array,
        rate: jax.Array,
        step: jax.Array,
    ) -> tuple[optax.Params, optax.OptState, jax.Array]:
        loss, grads = jax.value_and_grad(task.loss)(params, task.train_batch(seed, step))
        updates, state = optimizer.update(grads, state, params, value=loss)
        moved = jax.tree.map(lambda param, update: param + rate * update, params, updates)
        return moved, state, loss

    def step(carry: Any, inputs: tuple[jax.Array, jax.Array]) -> tuple[Any, jax.Array]:
        number, rate = inputs
        side_by_side = jax.vmap(one, in_axes=(0, 0, 0, 0, None))
        params, state, loss = side_by_side(carry[0], carry[1], seeds, rate, number)
        return (params, state), loss

    numbers = start + jnp.arange(rates.shape[0])
    (params, state), losses = jax.lax.scan(step, (params, state), (numbers, rates))
    return params, state, jnp.mean(losses, axis=0)
