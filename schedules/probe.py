"""Probes: the loss at a few rates along the update, on batches of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax

from schedules.errors import ScheduleError
from schedules.tuner_config import TunerConfig
from schedules.tuner_rules import after_probe
from schedules.tuner_state import (
    EXPLOIT,
    RAMP,
    TunerState,
    tuner_state,
    with_tuner_state,
)

LossFn = Callable[[Any, Any], jax.Array]
"""(params, batch) -> scalar loss, the mean over the whole batch on all devices."""


def current_lr(opt_state: Any) -> jax.Array:
    """Rate of the next update, float32[]: the one place to log it from.

    Args:
        opt_state: State of an optimizer with one `lr_tuner` in it.

    Raises:
        ScheduleError: It has none, or more than one.
    """
    return tuner_state(opt_state).lr


def probe_positions(opt_state: Any, config: TunerConfig, step: int) -> range:
    """Which batches of a probe are to be measured before update `step`.

    Nothing is read from the devices at the steps between probes, so the train loop
    stays asynchronous there. At the others two numbers are read that are the same
    on every host, so every host comes to the same answer. After a stop in the
    middle of a probe, it goes on with the batch that comes next. The batches of a
    probe are spread over the updates of its interval: one moment's direction, and
    momentum that has overshot, say less than several.

    Args:
        opt_state: State of an optimizer with one `lr_tuner` in it.
        config: The tuner's.
        step: Updates made so far, counted by the host.

    Returns:
        The position in the probe of the batch to measure, or nothing.

    Raises:
        ScheduleError: The state has another count: it is not that of this step.
    """
    if step == 0 or step % config.batch_interval:
        return range(0)
    state = tuner_state(opt_state)
    count = int(state.num_updates)
    if count != step:
        raise ScheduleError(
            f"step {step}, but the tuner has seen {count} updates: count real updates from 0, "
            "and restore the optimizer state together with the step"
        )
    if int(state.phase) not in (RAMP, EXPLOIT) or int(state.measured_at) == count:
        return range(0)
    position = int(state.probe_pos)
    return range(position, position + 1)


def direction_of(
    optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> Any:
    """The update that `optimizer` would make of `grads` at a learning rate of 1.

    `opt_state` is left as it is: moments do not see a probe's gradient.

    Args:
        optimizer: The whole chain, ending in `lr_tuner`. Of an `optax.MultiSteps`, the inner one.
        grads: Gradients, a pytree like `params`.
        opt_state: Its state. Of an `optax.MultiSteps`, `inner_opt_state`.
        params: Parameters.

    Returns:
        A pytree like `params`, sharded as the updates are.
    """
    state = tuner_state(opt_state)
    at_one = with_tuner_state(opt_state, state._replace(lr=jnp.ones_like(state.lr)))
    update = cast(optax.GradientTransformationExtraArgs, optimizer).update
    updates, _ = update(grads, at_one, params, value=jnp.zeros((), jnp.float32))
    return updates


def probe_direction(
    optimizer: optax.GradientTransformation, loss_fn: LossFn
) -> Callable[[Any, Any, Any], Any]:
    """A compiled (params, opt_state, batch) -> direction.

    Give it the batch of the update to come, so that the probe looks where that
    update will go. A pure function of its arguments.

    Args:
        optimizer: The whole chain, ending in `lr_tuner`.
        loss_fn: The train loss.
    """

    @jax.jit
    def direction(params: Any, opt_state: Any, batch: Any) -> Any:
        grads = jax.grad(loss_fn)(params, batch)
        return direction_of(optimizer, grads, opt_state, params)

    return direction


def path_direction(params: Any, start: Any, opt_state: Any) -> Any:
    """The way from `start` to `params` as a direction for the present rate.

    Probing along it, from `start`, asks whether all the updates since then should have
    been longer. That has far less noise than one update's direction, and is less short-sighted;
    it needs no gradient, but `start`: a copy of the parameters at the last probe.

    Args:
        params: Parameters now.
        start: Parameters when the rate was last set.
        opt_state: State of an optimizer with one `lr_tuner` in it.

    Returns:
        A float32 pytree like `params`: `start` + rate * direction is `params`.
    """
    rate = tuner_state(opt_state).lr

    def between(now: jax.Array, then: jax.Array) -> jax.Array:
        return (now.astype(jnp.float32) - then.astype(jnp.float32)) / rate

    return jax.tree.map(between, params, start)


def trial_rates(opt_state: Any, config: TunerConfig) -> jax.Array:
    """The rates that the next probe tries, float32[G], the first of them 0."""
    multiples = jnp.asarray(config.rate_multiples, jnp.float32)
    return tuner_state(opt_state).lr * multiples


def trial_params(params: Any, direction: Any, rate: jax.Array) -> Any:
    """`params` moved by `rate` along `direction`: a copy, of the same dtypes and sharding."""

    def moved(param: jax.Array, step: jax.Array) -> jax.Array:
        at = param.astype(jnp.float32) + rate * step.astype(jnp.float32)
        return at.astype(param.dtype)

    return jax.tree.map(moved, params, direction)


def record_losses(opt_state: Any, losses: jax.Array, config: TunerConfig) -> Any:
    """Takes in the losses of one probe batch; with the last one, sets the rate.

    For train loops that compute losses their own way; `probe_step` calls it.

    Args:
        opt_state: State of an optimizer with one `lr_tuner` in it.
        losses: float[G], at `trial_rates` and on the same batch; the same on all hosts.
        config: The tuner's.

    Returns:
        The new state.
    """
    state = tuner_state(opt_state)
    losses = jnp.asarray(losses, jnp.float32)
    differences = (losses - losses[0]).at[0].set(losses[0])
    summed = state._replace(
        loss_sums=state.loss_sums + differences,
        probe_pos=state.probe_pos + 1,
        measured_at=state.num_updates,
    )

    def finished(state: TunerState) -> TunerState:
        return after_probe(config, state)

    is_last = summed.probe_pos >= config.num_batches
    new = jax.lax.cond(is_last, finished, lambda state: state, summed)
    return with_tuner_state(opt_state, new)


def probe_step(loss_fn: LossFn, config: TunerConfig) -> Callable[[Any, Any, Any, Any], Any]:
    """A compiled (params, opt_state, direction, probe_batch) -> opt_state.

    It measures one batch at all rates, one after the other: beside the direction
    that takes the memory of one copy of the parameters, and as many evaluations
    of `loss_fn` as there are rates. Batches must not have been used for the
    direction: a direction looks too good on its own batch. Draw them from a
    stream of their own, keyed by step and position, so that a resumed run draws
    the same ones. Dropout and other noise belongs off.

    Args:
        loss_fn: The loss to probe.
        config: The tuner's.
    """

    @jax.jit
    def probe(params: Any, opt_state: Any, direction: Any, batch: Any) -> Any:
        def loss_at(rate: jax.Array) -> jax.Array:
            return jnp.asarray(loss_fn(trial_params(params, direction, rate), batch), jnp.float32)

        losses = jax.lax.map(loss_at, trial_rates(opt_state, config))
        return record_losses(opt_state, losses, config)

    return probe
