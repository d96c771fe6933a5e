"""What is decided once a step for all parameters: norm, clipping, rate, and whether to apply.

One program for one device, the same whatever the number of devices: every device runs it on
the same numbers and comes to the same result, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jaxserve.trainer.incidents import IncidentState, initial_incidents, judge
from jaxserve.trainer.step_config import IncidentConfig
from schedules import ScheduleConfig, TunerConfig, TunerState, lr_tuner, make_schedule

Rate: TypeAlias = ScheduleConfig | TunerConfig


class Decision(NamedTuple):
    """Scalars on one device.

    Attributes:
        loss: float32[], mean loss of the global batch.
        grad_norm: float32[], of the gradient before clipping.
        scale: float32[], factor of the gradient.
        lr: float32[], rate of this update.
        applied: bool[], whether the update is to be applied.
        is_finite: bool[], whether loss and norm are.
    """

    loss: jax.Array
    grad_norm: jax.Array
    scale: jax.Array
    lr: jax.Array
    applied: jax.Array
    is_finite: jax.Array


class DecisionState(NamedTuple):
    """What decisions remember from step to step: small arrays, on every device.

    Attributes:
        incidents: history of losses.
        tuner: of a rate that tunes itself, or None.
    """

    incidents: IncidentState
    tuner: TunerState | None


@dataclass(frozen=True)
class DecisionSpec:
    """What the program is compiled for."""

    rate: Rate
    incidents: IncidentConfig
    clip_norm: float | None


def initial_decision_state(spec: DecisionSpec) -> DecisionState:
    """The state before the first step."""
    tuner = None
    if isinstance(spec.rate, TunerConfig):
        tuner = _as_tuner(lr_tuner(spec.rate).init(jnp.zeros(())))
    return DecisionState(initial_incidents(spec.incidents), tuner)


@lru_cache(maxsize=32)
def _schedule(config: ScheduleConfig) -> optax.Schedule:
    return make_schedule(config)


@partial(jax.jit, static_argnums=0)
def decide(
    spec: DecisionSpec,
    sums: jax.Array,
    losses: jax.Array,
    state: DecisionState,
    step: jax.Array,
) -> tuple[Decision, DecisionState]:
    """The decision of a step, and what is remembered of it.

    Args:
        spec: what to compile for.
        sums: float32[num_blocks], sums of squares of the gradient's blocks.
        losses: float32[num_leaves, 1], shares of the leaves in the mean loss.
        state: from the step before.
        step: int32[].
    """
    loss = tree_sum(losses[:, 0])
    grad_norm = jnp.sqrt(tree_sum(sums))
    is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    applied, incidents = judge(spec.incidents, state.incidents, loss, is_finite)
    scale = jnp.ones((), jnp.float32)
    if spec.clip_norm is not None:
        limit = jnp.float32(spec.clip_norm)
        scale = jnp.where(grad_norm > limit, limit / grad_norm, scale)
    if isinstance(spec.rate, TunerConfig):
        assert state.tuner is not None
        lr = state.tuner.lr
        # The tuner's own scaling is not used: it only takes in the loss.
        _, tuner = lr_tuner(spec.rate).update((), state.tuner, value=loss)
    else:
        lr, tuner = jnp.asarray(_schedule(spec.rate)(step), jnp.float32), None
    decision = Decision(loss, grad_norm, scale, lr, applied, is_finite)
    return decision, DecisionState(incidents, _as_tuner(tuner))


def _as_tuner(state: Any) -> TunerState | None:
    assert state is None or isinstance(state, TunerState)
    return state


@jax.jit
def sum_losses(losses: jax.Array) -> jax.Array:
    """Sum of the leaves' shares along the tree: float32[num_leaves] -> float32[]."""
    return tree_sum(losses)


def tree_sum(values: jax.Array) -> jax.Array:
    """Sum of float32[n] by additions of neighbours, after padding with zeros to 2**k of them."""
    size = 1 << max(0, values.shape[0] - 1).bit_length()
    values = jnp.pad(values, (0, size - values.shape[0]))
    while size > 1:
        values = values[0::2] + values[1::2]
        size //= 2
    return values[0]
