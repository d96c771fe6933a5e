"""All that a tuner remembers, as arrays that a checkpoint can hold."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from schedules.errors import ScheduleError
from schedules.tuner_config import TunerConfig

RAMP, HOLD, DECAY, EXPLOIT = range(4)
"""Phases. RAMP: probes set the rate. HOLD: it moves to the peak and stays. DECAY: linear to 0.
EXPLOIT: probes may lower it."""

NUM_RATES = 16
"""Optimal rates kept for the median."""
NUM_LOSSES = 16
"""Train losses kept for the median."""


class TunerState(NamedTuple):
    """State of `lr_tuner`; float32 and int32 arrays of fixed shapes, replicated.

    Between the batches of a probe it holds the sums so far, so that a run stopped
    there goes on with the next batch. Random numbers are not in it: derive them
    from the count.

    Attributes:
        num_updates: int32[], updates made: the count that schedules speak of.
        phase: int32[], RAMP, HOLD, DECAY or EXPLOIT.
        lr: float32[], rate of the next update.
        peak: float32[], rate to hold, and to decay from.
        hold_until: int32[], count at which the decay begins, or the exploring ends.
        log_rates: float32[16], logarithms of the latest optimal rates, newest last.
        num_rates: int32[], how many of them are filled.
        loss_sums: float32[G], sums over this probe's batches: at rate 0 of the loss, at the
            others of its difference from that.
        probe_pos: int32[], batches of this probe that are done.
        num_probes: int32[], probes finished.
        measured_at: int32[], count at which the latest batch was measured; -1 before the first.
        num_rejected: int32[], probes in a row that said nothing.
        coefficients: float32[3], latest parabola a x^2 + b x + c with x in terms of the rate.
        r_squared: float32[], share of the losses' variance that it explains.
        losses: float32[16], latest train losses, newest last.
        num_losses: int32[], how many of them are filled.
        window_sum: float32[], sum of the train losses since the last probe.
        window_steps: int32[], how many they are.
        last_window_loss: float32[], their mean at the last probe; infinite before the first.
        num_rollbacks: int32[], times that a spike of the loss has halved the rate.
        rollback_count: int32[], count of the last time.
    """

    num_updates: jax.Array
    phase: jax.Array
    lr: jax.Array
    peak: jax.Array
    hold_until: jax.Array
    log_rates: jax.Array
    num_rates: jax.Array
    loss_sums: jax.Array
    probe_pos: jax.Array
    num_probes: jax.Array
    measured_at: jax.Array
    num_rejected: jax.Array
    coefficients: jax.Array
    r_squared: jax.Array
    losses: jax.Array
    num_losses: jax.Array
    window_sum: jax.Array
    window_steps: jax.Array
    last_window_loss: jax.Array
    num_rollbacks: jax.Array
    rollback_count: jax.Array


def initial_state(config: TunerConfig) -> TunerState:
    """The state before the first update."""

    def whole(value: int) -> jax.Array:
        return jnp.asarray(value, jnp.int32)

    def real(value: float) -> jax.Array:
        return jnp.asarray(value, jnp.float32)

    explores_by_count = config.variant in ("explore_exploit", "running_max")
    return TunerState(
        num_updates=whole(0),
        phase=whole(RAMP),
        lr=real(config.initial_lr),
        peak=real(config.initial_lr),
        hold_until=whole(config.explore_steps if explores_by_count else config.total_steps),
        log_rates=jnp.zeros(NUM_RATES, jnp.float32),
        num_rates=whole(0),
        loss_sums=jnp.zeros(len(config.rate_multiples), jnp.float32),
        probe_pos=whole(0),
        num_probes=whole(0),
        measured_at=whole(-1),
        num_rejected=whole(0),
        coefficients=jnp.zeros(3, jnp.float32),
        r_squared=real(0.0),
        losses=jnp.zeros(NUM_LOSSES, jnp.float32),
        num_losses=whole(0),
        window_sum=real(0.0),
        window_steps=whole(0),
        last_window_loss=real(jnp.inf),
        num_rollbacks=whole(0),
        rollback_count=whole(-(2**30)),
    )


def push(ring: jax.Array, fill: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`ring` with `value` at its end and its oldest gone, and how many are filled."""
    return jnp.append(ring[1:], value), jnp.minimum(fill + 1, ring.shape[0])


def median(ring: jax.Array, fill: jax.Array) -> jax.Array:
    """Median of the `fill` newest values; the mean of the middle two if they are even."""
    is_filled = jnp.arange(ring.shape[0]) >= ring.shape[0] - fill
    ordered = jnp.sort(jnp.where(is_filled, ring, jnp.inf))
    upper = ordered[fill // 2]
    lower = ordered[jnp.maximum((fill - 1) // 2, 0)]
    return 0.5 * (lower + upper)


def tuner_state(opt_state: Any) -> TunerState:
    """The tuner's state inside an optimizer's.

    Args:
        opt_state: State of any optimizer that has one `lr_tuner` in it, or the tuner's own.

    Raises:
        ScheduleError: There is no tuner, or more than one.
    """
    leaves = jax.tree.leaves(opt_state, is_leaf=_is_tuner_state)
    found = [leaf for leaf in leaves if _is_tuner_state(leaf)]
    if len(found) != 1:
        raise ScheduleError(
            f"the optimizer state holds {len(found)} tuners; exactly one `lr_tuner` must be in "
            "the chain, as its last part"
        )
    state: TunerState = found[0]
    return state


def with_tuner_state(opt_state: Any, state: TunerState) -> Any:
    """`opt_state` with `state` in the place of its tuner's."""
    return jax.tree.map(
        lambda leaf: state if _is_tuner_state(leaf) else leaf,
        opt_state,
        is_leaf=_is_tuner_state,
    )


def _is_tuner_state(leaf: Any) -> bool:
    return isinstance(leaf, TunerState)
