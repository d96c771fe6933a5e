"""What a tuner concludes from its losses: pure functions from state to state."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from schedules.parabola import Parabola, fit_parabola
from schedules.tuner_config import TunerConfig
from schedules.tuner_state import (
    DECAY,
    EXPLOIT,
    HOLD,
    RAMP,
    TunerState,
    median,
    push,
)

MIN_LOSSES = 8
"""Train losses before a spike can be told."""
SPIKE_LOSSES = 3
"""Train losses in a row that make a spike: one batch may just be hard."""


class Reading(NamedTuple):
    """What the parabola of a probe says.

    Attributes:
        is_finite: bool[], all losses are.
        has_said: bool[], the parabola is trusted.
        is_beyond: bool[], the optimum lies beyond the largest rate tried.
        is_uphill: bool[], at rate 0.
        optimum: float32[], where it is said to be; if beyond, the largest rate tried.
    """

    is_finite: jax.Array
    has_said: jax.Array
    is_beyond: jax.Array
    is_uphill: jax.Array
    optimum: jax.Array


def after_probe(config: TunerConfig, state: TunerState) -> TunerState:
    """The state once the losses of a probe's last batch are in.

    The parabola is trusted if the losses are finite, not flat to float32's
    resolution, and explained by it to `min_r_squared`. A trusted one says "the
    optimum is here" (a > 0 and the vertex within the rates tried), "beyond the
    largest rate tried" (no such vertex, and the largest rate has the lowest loss)
    or "uphill" (rate 0 has it: recent updates were too long), which counts as the
    lowest rate that one probe may set. Anything else is rejected and changes
    nothing, but that a loss which is not finite lowers the rate as far as it may.
    """
    means = state.loss_sums / config.num_batches
    differences = means.at[0].set(0.0)
    fit = fit_parabola(config.rate_multiples, differences)
    reading = _read(config, state, fit, means[0], differences)
    window_loss = state.window_sum / jnp.maximum(state.window_steps, 1)
    has_risen = window_loss > state.last_window_loss * (1.0 + config.loss_tolerance)
    if config.variant == "auto":
        reading, target, is_growing = _ramp_wishes(config, state, reading)
        counts = reading.has_said & ~is_growing
        num_before = jnp.where(is_growing, 0, state.num_rates)
    else:
        target, counts = _tracking_wishes(config, state, reading)
        num_before = state.num_rates
    if config.is_guarded:
        target = jnp.where(has_risen, jnp.minimum(target, state.lr), target)
    log_rate = jnp.log(jnp.where(counts, reading.optimum, 1.0))
    rates, num_rates = push(state.log_rates, num_before, log_rate)
    judged = state._replace(
        log_rates=jnp.where(counts, rates, state.log_rates),
        num_rates=jnp.where(counts, num_rates, num_before),
        loss_sums=jnp.zeros_like(state.loss_sums),
        probe_pos=jnp.zeros_like(state.probe_pos),
        num_probes=state.num_probes + 1,
        num_rejected=jnp.where(reading.has_said, 0, state.num_rejected + 1),
        coefficients=fit.coefficients,
        r_squared=fit.r_squared,
        window_sum=jnp.zeros_like(state.window_sum),
        window_steps=jnp.zeros_like(state.window_steps),
        last_window_loss=jnp.where(state.window_steps > 0, window_loss, state.last_window_loss),
    )
    return _follow(config, judged, jnp.minimum(target, config.max_lr))


def _read(
    config: TunerConfig,
    state: TunerState,
    fit: Parabola,
    base_loss: jax.Array,
    differences: jax.Array,
) -> Reading:
    """Whether the optimum was found, lies beyond the rates tried, or at none of them."""
    largest = config.rate_multiples[-1]
    has_minimum = fit.coefficients[0] > 0
    is_finite = jnp.all(jnp.isfinite(differences))
    if config.is_guarded:
        resolution = 8.0 * jnp.finfo(jnp.float32).eps * jnp.abs(base_loss)
        is_trusted = is_finite & (jnp.max(jnp.abs(differences)) > resolution)
        is_trusted &= fit.r_squared >= config.min_r_squared
        found = is_trusted & has_minimum & (fit.vertex > 0) & (fit.vertex <= largest)
        uphill = is_trusted & (jnp.argmin(differences) == 0) & ~found
        is_falling = jnp.argmin(differences) == len(config.rate_multiples) - 1
        is_beyond = is_trusted & is_falling & (fit.vertex > largest)
    else:
        # The controls believe every parabola; an uphill direction asks for the lowest rate.
        found, uphill = has_minimum, jnp.zeros((), bool)
        is_beyond = jnp.isfinite(fit.r_squared) & ~has_minimum
    optimum = state.lr * jnp.where(found, fit.vertex, largest)
    optimum = jnp.where(uphill, state.lr / config.max_growth, optimum)
    return Reading(is_finite, found | uphill | is_beyond, is_beyond, uphill, optimum)


def _ramp_wishes(
    config: TunerConfig, state: TunerState, reading: Reading
) -> tuple[Reading, jax.Array, jax.Array]:
    """auto: the rate to hold by this probe, the next rate, whether it grows at full speed.

    The optimum over the rate falls as the rate rises, about linearly in its logarithm; the rate
    to hold is where it is `settled_vertex`. A step towards it is at most `max_growth` fold.
    """
    vertex = reading.optimum / state.lr
    doublings = (vertex - config.settled_vertex) / config.vertex_per_doubling
    most = math.log2(config.max_growth)
    doublings = jnp.where(reading.is_beyond, most, jnp.clip(doublings, -most, most))
    doublings = jnp.where(reading.is_uphill, -most, doublings)
    wished = state.lr * jnp.exp2(doublings)
    lowest = state.lr / config.max_growth
    target = jnp.where(reading.has_said, wished, state.lr)
    target = jnp.where(reading.is_finite, target, lowest)
    return reading._replace(optimum=wished), target, reading.has_said & (doublings >= most)


def _tracking_wishes(
    config: TunerConfig, state: TunerState, reading: Reading
) -> tuple[jax.Array, jax.Array]:
    """Variants that follow the optimum: the next rate, and whether the optimum counts."""
    lowest, highest = state.lr / config.max_growth, state.lr * config.max_growth
    bounded = jnp.clip(reading.optimum, lowest, highest)
    target = jnp.where(reading.has_said, bounded, state.lr)
    target = jnp.where(reading.is_finite, target, lowest)
    # Before there are estimates, one that lies beyond says that the rate is not there yet; then
    # it counts as the largest rate tried: leaving it out would pull the median down.
    counts = reading.has_said & (~reading.is_beyond | (state.num_rates > 0))
    return target, counts


def _follow(config: TunerConfig, state: TunerState, target: jax.Array) -> TunerState:
    """Moves the rate as the variant does."""
    if config.variant == "greedy":
        return state._replace(lr=target)
    if config.variant == "running_max":
        return state._replace(lr=jnp.maximum(state.lr, target))
    if config.variant == "auto":
        moved = state._replace(lr=target)
        is_over = state.num_rates >= config.min_estimates
        is_over &= state.num_updates >= config.min_ramp_steps
        is_over |= state.num_rejected >= 2
        return _select(is_over, _hold(config, moved), moved)
    # explore_exploit: the median decides once there is one, so that no single probe can.
    typical = jnp.exp(median(state.log_rates, state.num_rates))
    has_typical = (state.num_rates >= config.min_estimates) & (state.num_rejected == 0)
    lowest, highest = state.lr / config.max_growth, jnp.maximum(target, state.lr)
    bounded = jnp.where(has_typical, jnp.clip(typical, lowest, highest), target)
    is_exploring = state.phase == RAMP
    lr = jnp.where(is_exploring, jnp.maximum(state.lr, bounded), jnp.minimum(state.lr, bounded))
    return state._replace(lr=jnp.minimum(lr, config.max_lr))


def after_update(config: TunerConfig, state: TunerState, value: jax.Array) -> TunerState:
    """The state after an update whose train loss was `value` (float32[])."""
    is_finite = jnp.isfinite(value)
    threshold = config.rollback_factor * median(state.losses, state.num_losses)
    losses, num_losses = push(state.losses, state.num_losses, value)
    is_high = jnp.min(losses[-SPIKE_LOSSES:]) > threshold
    is_spike = ~is_finite | ((state.num_losses >= MIN_LOSSES) & is_high)
    is_spike &= state.num_updates - state.rollback_count >= config.probe_interval
    state = state._replace(
        num_updates=state.num_updates + 1,
        losses=jnp.where(is_finite, losses, state.losses),
        num_losses=jnp.where(is_finite, num_losses, state.num_losses),
        window_sum=state.window_sum + jnp.where(is_finite, value, 0.0),
        window_steps=state.window_steps + is_finite.astype(jnp.int32),
    )
    if config.is_guarded:
        state = _select(is_spike, _rolled_back(config, state), state)
    return _at_count(config, state)


def _rolled_back(config: TunerConfig, state: TunerState) -> TunerState:
    """Half the rate, for good: half the peak too, and no further ramp."""
    halved = state._replace(
        lr=0.5 * state.lr,
        peak=0.5 * state.peak,
        num_rollbacks=state.num_rollbacks + 1,
        rollback_count=state.num_updates,
    )
    if config.variant == "auto":
        held = _hold(config, halved)._replace(peak=halved.lr)
        return _select(state.phase == RAMP, held, halved)
    return halved


def _hold(config: TunerConfig, state: TunerState) -> TunerState:
    """The end of the ramp: the peak is set, and with it the rest of the run."""
    # A probe goes half of the way: the first third still lags behind.
    newest = (2 * state.num_rates + 2) // 3
    optimum = jnp.exp(median(state.log_rates, newest))
    peak = jnp.where(state.num_rates > 0, optimum, state.lr)
    return state._replace(
        phase=jnp.full_like(state.phase, HOLD),
        peak=jnp.minimum(peak, config.max_lr),
        hold_until=jnp.minimum(state.num_updates + config.explore_steps, config.total_steps),
    )


def _at_count(config: TunerConfig, state: TunerState) -> TunerState:
    """Phases that end and rates that move by count alone."""
    count, is_ramp = state.num_updates, state.phase == RAMP
    if config.variant == "auto":
        is_late = is_ramp & (count >= config.max_ramp_steps)
        state = _select(is_late, _hold(config, state), state)
    next_phase = EXPLOIT if config.variant == "explore_exploit" else DECAY
    explored = is_ramp & (count >= state.hold_until) & (config.variant != "greedy")
    state = state._replace(phase=jnp.where(explored, next_phase, state.phase))
    state = state._replace(peak=jnp.where(explored, state.lr, state.peak))

    nearer = jnp.clip(state.peak, state.lr / config.max_growth, state.lr * config.max_growth)
    moves = (state.phase == HOLD) & (count % config.probe_interval == 0)
    state = state._replace(lr=jnp.where(moves, nearer, state.lr))
    ends = (state.phase == HOLD) & (count >= state.hold_until)
    state = state._replace(
        phase=jnp.where(ends, DECAY, state.phase), peak=jnp.where(ends, state.lr, state.peak)
    )
    counts_left = jnp.maximum(config.total_steps - count, 0).astype(jnp.float32)
    decay_steps = jnp.maximum(config.total_steps - state.hold_until, 1).astype(jnp.float32)
    decayed = state.peak * (counts_left / decay_steps)
    return state._replace(lr=jnp.where(state.phase == DECAY, decayed, state.lr))


def _select(condition: jax.Array, then: TunerState, otherwise: TunerState) -> TunerState:
    chosen: TunerState = jax.tree.map(lambda a, b: jnp.where(condition, a, b), then, otherwise)
    return chosen
