"""Warm-up, plateau and decay: the shape of Knee, WSD, linear, cosine and polynomial.

Every rate here is float32 whatever the dtype of the count, so that a program
compiled with it never meets another dtype. Counts are taken as float32: exact
up to 2**24, and to one part in 10**7 beyond, as for counts of tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from schedules.errors import ScheduleError

DecayShape = Callable[[jax.Array], jax.Array]
"""Fraction of the decay that remains, 1 to 0 -> fraction of the peak, 1 to 0."""


def linear_decay(remaining: jax.Array) -> jax.Array:
    """Straight to zero."""
    return remaining


def cosine_decay(remaining: jax.Array) -> jax.Array:
    """Half a period of a cosine."""
    return 0.5 * (1.0 - jnp.cos(jnp.pi * remaining))


def sqrt_decay(remaining: jax.Array) -> jax.Array:
    """1 - sqrt(elapsed): falls fast at first, as some cool-downs of WSD do."""
    return 1.0 - jnp.sqrt(1.0 - remaining)


def polynomial_decay(power: float) -> DecayShape:
    """remaining ** power: 1 is linear, 2 ends flat."""
    return lambda remaining: remaining**power


def trapezoid(
    peak_value: jax.typing.ArrayLike,
    warmup: int,
    plateau: int,
    decay: int,
    shape: DecayShape = linear_decay,
    init_value: jax.typing.ArrayLike = 0.0,
    end_value: jax.typing.ArrayLike = 0.0,
) -> optax.Schedule:
    """Linear from `init_value` to `peak_value`, level, then `shape` down to `end_value`.

    Without a decay (`decay=0`) the peak is held for good; after a decay the end
    value is. Without a warm-up the rate is the peak from the first count on.

    Args:
        peak_value: The rate of the plateau; may be traced, to try many at once under `jax.vmap`.
        warmup: Length of the rise, in counts.
        plateau: Length of the level part, in counts.
        decay: Length of the fall, in counts.
        shape: Form of the fall.
        init_value: The rate at count 0, if there is a warm-up.
        end_value: The rate at the end of the decay and after it.

    Returns:
        A schedule: count (any integer or float dtype, any shape) -> float32 of that shape.
    """

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(count, jnp.float32)
        peak, init, end = (jnp.asarray(x, jnp.float32) for x in (peak_value, init_value, end_value))
        rate = jnp.broadcast_to(peak, jnp.broadcast_shapes(t.shape, peak.shape))
        if warmup:
            rising = init + (peak - init) * (t / jnp.float32(warmup))
            rate = jnp.where(t < warmup, rising, rate)
        if decay:
            # What remains, not what has gone: a difference of counts is exact, 1 - u is not.
            counts_left = jnp.float32(warmup + plateau + decay) - t
            remaining = jnp.clip(counts_left / jnp.float32(decay), 0.0, 1.0)
            falling = end + (peak - end) * shape(remaining)
            rate = jnp.where(t > warmup + plateau, falling, rate)
        return rate

    return schedule


def shifted(schedule: optax.Schedule, count_from: int) -> optax.Schedule:
    """`schedule`, read `count_from` counts later: optax's first update has count 0."""
    if count_from == 0:
        return schedule
    return lambda count: schedule(count + count_from)


def knee(
    peak_value: jax.typing.ArrayLike,
    total_steps: int,
    warmup_steps: int = 0,
    explore_fraction: float = 0.5,
    init_value: jax.typing.ArrayLike = 0.0,
    end_value: jax.typing.ArrayLike = 0.0,
    count_from: int = 0,
) -> optax.Schedule:
    """The Knee schedule: explore at a high constant rate, then decay linearly.

    "Wide-minima Density Hypothesis and the Explore-Exploit Learning Rate Schedule"
    (Iyer et al., JMLR 24(65), 2023; arXiv 2003.03977) argues that narrow minima
    are many and wide ones few, so that a run must stay at a high rate for long
    enough to land in a wide one ("explore") before it descends ("exploit").
    With the paper's default of half of the budget, the peak is the only choice
    left. The shape is that of WSD or a trapezoid.

    With T = `total_steps`, W = `warmup_steps`, X = `explore_fraction` * T
    (rounded; counted after the warm-up) and D = T - W - X, the rate at t is

    * t <= W: rises linearly from `init_value` to `peak_value`;
    * W < t <= W + X: `peak_value`;
    * t > W + X: falls linearly, `end_value` at T and after it.

    optax counts updates from 0, so with `count_from=0` the first update of a
    warm-up has `init_value` and the last update (count T - 1) still has peak / D.
    The authors count from 1: `count_from=1` gives their rates exactly, with
    peak / W at the first update and `end_value` at the last one.

    Args:
        peak_value: Highest rate; may be traced.
        total_steps: T, the number of updates of the whole run.
        warmup_steps: W.
        explore_fraction: X / T, 0 to 1.
        init_value: Rate at t = 0, if there is a warm-up.
        end_value: Rate at t = T.
        count_from: 0 for optax's counting, 1 for the authors'.

    Returns:
        A schedule: count (any integer dtype, any shape) -> float32 of that shape.
        It holds no state: an optimizer's own int32 count resumes it.

    Raises:
        ScheduleError: The phases do not fit into `total_steps`, or `count_from` is not 0 or 1.

    Examples:
        >>> import schedules
        >>> rate = schedules.knee(0.1, total_steps=10, warmup_steps=2)
        >>> [round(float(rate(count)), 3) for count in range(11)]
        [0.0, 0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.067, 0.033, 0.0]
        >>> authors = schedules.knee(0.1, total_steps=10, warmup_steps=2, count_from=1)
        >>> [round(float(authors(count)), 3) for count in range(10)]
        [0.05, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.067, 0.033, 0.0]
    """
    if total_steps < 1:
        raise ScheduleError(f"total_steps is {total_steps}; a run has at least 1")
    if not 0 <= warmup_steps <= total_steps:
        raise ScheduleError(
            f"warmup_steps is {warmup_steps}; it must be 0 to total_steps ({total_steps})"
        )
    if not 0.0 <= explore_fraction <= 1.0:
        raise ScheduleError(f"explore_fraction is {explore_fraction}; it must be 0 to 1")
    if count_from not in (0, 1):
        raise ScheduleError(f"count_from is {count_from}; it must be 0 (optax) or 1 (the authors)")
    explore_steps = round(explore_fraction * total_steps)
    decay_steps = total_steps - warmup_steps - explore_steps
    if decay_steps < 0:
        largest = (total_steps - warmup_steps) / total_steps
        raise ScheduleError(
            f"warm-up ({warmup_steps}) and exploring ({explore_steps}) are longer than the run "
            f"({total_steps}): lower explore_fraction to {largest:.4g} or less, or warmup_steps"
        )
    rate = trapezoid(
        peak_value,
        warmup_steps,
        explore_steps,
        decay_steps,
        init_value=init_value,
        end_value=end_value,
    )
    return shifted(rate, count_from)
