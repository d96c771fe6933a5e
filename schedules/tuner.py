"""A learning rate tuned as training proceeds, as the last part of an optax chain."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from schedules.errors import ScheduleError
from schedules.tuner_config import TunerConfig
from schedules.tuner_rules import after_update
from schedules.tuner_state import TunerState, initial_state, tuner_state


def lr_tuner(config: TunerConfig) -> optax.GradientTransformationExtraArgs:
    """Scales updates by a learning rate that probes of the loss have set.

    What is public of LRTuner (Iyer et al., arXiv 2105.14526) is its abstract: the
    rate is tuned while training proceeds, for any optimizer, in an explore phase
    that keeps it high and an exploit phase. The method's constants and code are
    not public. What is here is a reconstruction, after the local quadratic model
    of LQA (Zhu et al., arXiv 2004.03260) and LABPAL (Mutschler and Zell, arXiv
    2108.13880) and the phases of Knee (arXiv 2003.03977); no figure of that paper
    is claimed for it.

    A probe takes the direction that the optimizer would go, measures the loss at
    a few rates along it on batches that took no part in it, and fits a parabola.
    The variants differ in what they do with its vertex:

    * `auto` (this project's own): double the rate while the vertex lies well beyond
      it, then move to where the vertex is `settled_vertex` times the rate; at the end
      of the ramp the peak is the median of the latest such rates; hold it and decay
      linearly to 0, as in Knee. No probes after the ramp. `path_direction` makes
      its probes far less noisy.
    * `explore_exploit` (the paper's idea as far as it is public): for
      `explore_fraction` of the run the rate only rises towards the median of the
      latest vertices; then it only falls towards it. Probes throughout.
    * `greedy`, `running_max` (negative controls, without the guards below): the
      vertex throughout, and the largest vertex so far followed by a linear decay.
      The first is short-sighted, the second lets every overestimate stay.

    The guards of the first two: a probe changes the rate at most `max_growth` fold;
    probes whose losses are flat, not finite or not explained by the parabola are
    rejected, and two in a row end auto's ramp with the estimates so far; no growth while
    the mean train loss rises; three train losses in a row above `rollback_factor`
    times the recent median, or one that is not finite, halve the rate for good (at
    most once per probe interval), and the update of a loss that is not finite is zero.

    Put it last: what comes before it must end in descent directions for a rate of
    1. `update` needs the train loss as `value`. It reads the state alone; probing
    is a step of its own (`probe_direction`, `probe_step`), dispatched by the host
    when `probe_positions` says so, so that the train step never holds a probe.
    With `optax.MultiSteps` around the chain, counts are those of real updates.

    Args:
        config: The settings.

    Returns:
        A transformation with a `TunerState`; `value` is a scalar, the same on all hosts.

    Examples:
        A quadratic whose best constant rate is 1 / 4:

        >>> import jax, jax.numpy as jnp, optax, schedules
        >>> config = schedules.TunerConfig(total_steps=240, initial_lr=0.01, num_batches=1)
        >>> optimizer = optax.chain(optax.scale(-1.0), schedules.lr_tuner(config))
        >>> def loss_fn(params, batch):
        ...     return jnp.sum(2.0 * (params - batch) ** 2)
        >>> direction_of = schedules.probe_direction(optimizer, loss_fn)
        >>> probe_step = schedules.probe_step(loss_fn, config)
        >>> @jax.jit
        ... def train_step(params, opt_state, batch):
        ...     loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        ...     updates, opt_state = optimizer.update(grads, opt_state, params, value=loss)
        ...     return optax.apply_updates(params, updates), opt_state
        >>> params, batch = jnp.full(3, 5.0), jnp.ones(3)
        >>> opt_state = optimizer.init(params)
        >>> for step in range(8):
        ...     for position in schedules.probe_positions(opt_state, config, step):
        ...         direction = direction_of(params, opt_state, batch)
        ...         opt_state = probe_step(params, opt_state, direction, batch)
        ...     params, opt_state = train_step(params, opt_state, batch)
        >>> round(float(schedules.current_lr(opt_state)), 4)
        0.08
    """

    def init(params: optax.Params) -> TunerState:
        del params
        return initial_state(config)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        value: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        del params, extra_args
        if value is None:
            raise ScheduleError("lr_tuner needs the train loss: optimizer.update(..., value=loss)")
        tuner = tuner_state(state)
        loss = jnp.asarray(value, jnp.float32)
        drops = config.is_guarded & ~jnp.isfinite(loss)

        def scaled(direction: jax.Array) -> jax.Array:
            step = (tuner.lr * direction.astype(jnp.float32)).astype(direction.dtype)
            return jnp.where(drops, jnp.zeros_like(step), step)

        return jax.tree.map(scaled, updates), after_update(config, tuner, loss)

    return optax.GradientTransformationExtraArgs(init, update)
