"""From a config to an `optax.Schedule`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from schedules.config import Kind, ScheduleConfig
from schedules.errors import ScheduleError
from schedules.trapezoid import (
    DecayShape,
    cosine_decay,
    knee,
    linear_decay,
    polynomial_decay,
    shifted,
    sqrt_decay,
    trapezoid,
)


def make_schedule(config: ScheduleConfig) -> optax.Schedule:
    """The schedule that `config` describes.

    With t the count, W the warm-up, T the total, D = T - W and r = (T - t) / D,
    after a linear rise to the peak at W the rate is end + (peak - end) * f, where f is

    * constant: 1; linear: r; cosine: (1 - cos(pi r)) / 2; polynomial: r ** power;
    * knee: 1 for `explore_fraction` * T, then linear (Iyer et al., arXiv 2003.03977);
    * wsd: 1 until T - `decay`, then linear, cosine or 1 - sqrt(elapsed share)
      (warm-up, stable, decay; Hu et al., arXiv 2404.06395, section 4);
    * one_cycle: as cosine, with a rise that is a cosine too, 30 % of T unless
      `warmup` is given (Smith and Topin, arXiv 1708.07120);

    and for two kinds that have no end

    * inverse_sqrt: peak * sqrt(timescale / (timescale + t - W)), which is
      peak * sqrt(W / t) by default (Vaswani et al., arXiv 1706.03762, section 5.3);
    * piecewise: peak * factor of the last boundary <= t.

    After T the rate stays at what it is at T. `rewarm_at` multiplies any of them by
    a rise from 0 to 1 after each resumption.

    Args:
        config: The schedule.

    Returns:
        A schedule: count (any integer or float dtype, any shape) -> float32 of that shape.

    Raises:
        ScheduleError: A rounding of tokens to steps left no room for a phase.

    Examples:
        >>> import schedules
        >>> config = schedules.ScheduleConfig(kind="cosine", peak_value=1.0, total=8, warmup=4)
        >>> rate = schedules.make_schedule(config)
        >>> [round(float(rate(count)), 3) for count in range(9)]
        [0.0, 0.25, 0.5, 0.75, 1.0, 0.854, 0.5, 0.146, 0.0]
        >>> tokens = schedules.ScheduleConfig(
        ...     kind="linear", peak_value=1.0, unit="tokens", total=4096, tokens_per_step=1024
        ... )
        >>> [float(schedules.make_schedule(tokens)(step)) for step in range(5)]
        [1.0, 0.75, 0.5, 0.25, 0.0]
    """
    counts = config.in_counts()
    rate = shifted(_BUILDERS[counts.kind](counts), counts.count_from)
    if counts.rewarm_at:
        rate = rewarmed(rate, counts.rewarm_at, counts.rewarm, counts.count_from)
    return rate


def rewarmed(
    schedule: optax.Schedule, at: Sequence[int], length: int, count_from: int = 0
) -> optax.Schedule:
    """`schedule`, brought up from zero again after each resumption.

    For optimizers whose state was lost or changed: moments start from nothing,
    and full steps along them would undo work. A run that resumes with its whole
    state needs none of this.

    Args:
        schedule: The schedule of the whole run.
        at: Counts at which the run was resumed; they are part of its config from then on.
        length: Counts that each rise takes; during a rise a later one starts anew.
        count_from: 1 lets the first update after a resumption have a rate above 0.

    Returns:
        A schedule whose rate at count c is `schedule(c)` times the smallest of
        1 and (c - a + count_from) / length over every a in `at` that is not above c.

    Raises:
        ScheduleError: `length` is below 1.

    Examples:
        >>> import optax, schedules
        >>> rate = schedules.rewarmed(optax.constant_schedule(0.5), at=[100], length=4)
        >>> [float(rate(count)) for count in (99, 100, 101, 102, 104, 105)]
        [0.5, 0.0, 0.125, 0.25, 0.5, 0.5]
    """
    if length < 1:
        raise ScheduleError(f"the length of a rise is {length}; it must be at least 1")

    def rewarming(count: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        rate = jnp.asarray(schedule(count), jnp.float32)
        for begin in at:
            risen = jnp.clip((t - begin + count_from) / jnp.float32(length), 0.0, 1.0)
            rate = jnp.where(t < begin, rate, jnp.minimum(rate, risen * schedule(count)))
        return rate

    return rewarming


def _decaying(config: ScheduleConfig) -> optax.Schedule:
    shapes: dict[str, DecayShape] = {"linear": linear_decay, "cosine": cosine_decay}
    shape = shapes.get(config.kind) or polynomial_decay(config.power or 1.0)
    decay = (config.total or 0) - config.warmup
    return trapezoid(
        config.peak_value,
        config.warmup,
        0,
        decay,
        shape,
        config.init_value or 0.0,
        config.end_value or 0.0,
    )


def _constant(config: ScheduleConfig) -> optax.Schedule:
    return trapezoid(config.peak_value, config.warmup, 0, 0, init_value=config.init_value or 0.0)


def _knee(config: ScheduleConfig) -> optax.Schedule:
    return knee(
        config.peak_value,
        config.total or 0,
        config.warmup,
        0.5 if config.explore_fraction is None else config.explore_fraction,
        config.init_value or 0.0,
        config.end_value or 0.0,
    )


def _wsd(config: ScheduleConfig) -> optax.Schedule:
    shape = {"linear": linear_decay, "cosine": cosine_decay, "sqrt": sqrt_decay}
    decay = config.decay or 0
    return trapezoid(
        config.peak_value,
        config.warmup,
        (config.total or 0) - config.warmup - decay,
        decay,
        shape[config.decay_shape or "linear"],
        config.init_value or 0.0,
        config.end_value or 0.0,
    )


def _inverse_sqrt(config: ScheduleConfig) -> optax.Schedule:
    timescale = float(config.timescale or config.warmup)
    rise = _constant(config)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        since = jnp.asarray(count, jnp.float32) - config.warmup
        fall = jnp.sqrt(timescale / (timescale + jnp.maximum(since, 0.0)))
        return jnp.asarray(rise(count)) * fall

    return schedule


def _one_cycle(config: ScheduleConfig) -> optax.Schedule:
    total = config.total or 0
    warmup = config.warmup or round(0.3 * total)
    peak = config.peak_value
    init = peak / 25.0 if config.init_value is None else config.init_value
    end = init / 1e4 if config.end_value is None else config.end_value
    fall = trapezoid(peak, warmup, 0, total - warmup, cosine_decay, end_value=end)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        risen = cosine_decay(jnp.clip(t / jnp.float32(max(warmup, 1)), 0.0, 1.0))
        return jnp.where(t < warmup, init + (peak - init) * risen, jnp.asarray(fall(count)))

    return schedule


def _piecewise(config: ScheduleConfig) -> optax.Schedule:
    rise = _constant(config)
    steps = tuple(zip(config.boundaries or (), config.factors or (), strict=True))

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        rate = jnp.asarray(rise(count))
        for boundary, factor in steps:
            rate = jnp.where(t < boundary, rate, jnp.float32(config.peak_value * factor))
        return rate

    return schedule


_BUILDERS: dict[Kind, Callable[[ScheduleConfig], optax.Schedule]] = {
    "constant": _constant,
    "linear": _decaying,
    "cosine": _decaying,
    "polynomial": _decaying,
    "knee": _knee,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
    "one_cycle": _one_cycle,
    "piecewise": _piecewise,
}
