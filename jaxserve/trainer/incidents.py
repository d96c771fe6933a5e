"""Losses that are not finite or jump: the rule, and what it remembers."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.step_config import IncidentConfig
from jaxserve.trainer.step_record import StepRecord

MIN_RELATIVE_SIGMA = 0.01
"""A standard deviation counts as at least this share of the mean: a run whose loss hardly moves
any more has no spikes of a thousandth."""


class IncidentState(NamedTuple):
    """Losses of the latest applied updates.

    Attributes:
        losses: float32[window], newest last.
        num_losses: int32[], how many of them are filled.
        num_incidents: int32[], updates dropped so far.
    """

    losses: jax.Array
    num_losses: jax.Array
    num_incidents: jax.Array


def initial_incidents(config: IncidentConfig) -> IncidentState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    return IncidentState(jnp.zeros((config.window,), jnp.float32), zero, zero)


def judge(
    config: IncidentConfig, state: IncidentState, loss: jax.Array, is_finite: jax.Array
) -> tuple[jax.Array, IncidentState]:
    """Whether an update is to be applied (bool[]), and the state after it.

    Args:
        config: the rule.
        state: before.
        loss: float32[], the step's loss.
        is_finite: bool[], whether loss and gradient are finite.
    """
    if config.policy == "off":
        return jnp.ones((), jnp.bool_), state
    applied = is_finite & ~_is_spike(config, state, loss)
    pushed = jnp.append(state.losses[1:], loss)
    losses = jnp.where(applied, pushed, state.losses)
    grown = jnp.minimum(state.num_losses + 1, config.window)
    return applied, IncidentState(
        losses=losses,
        num_losses=jnp.where(applied, grown, state.num_losses),
        num_incidents=state.num_incidents + jnp.where(applied, 0, 1),
    )


def _is_spike(config: IncidentConfig, state: IncidentState, loss: jax.Array) -> jax.Array:
    if config.spike_sigmas is None:
        return jnp.zeros((), jnp.bool_)
    is_filled = jnp.arange(config.window) >= config.window - state.num_losses
    count = jnp.maximum(state.num_losses, 1).astype(jnp.float32)
    mean = jnp.sum(jnp.where(is_filled, state.losses, 0.0)) / count
    spread = jnp.where(is_filled, (state.losses - mean) ** 2, 0.0)
    sigma = jnp.maximum(jnp.sqrt(jnp.sum(spread) / count), MIN_RELATIVE_SIGMA * jnp.abs(mean))
    is_high = loss > mean + config.spike_sigmas * sigma
    return is_high & (state.num_losses >= config.min_history)


def suspects_of(values: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]) -> tuple[int, ...]:
    """Example ids of the micro-batches that may have made a sum not finite, sorted.

    Args:
        values: float32[num_leaves], of the micro-batches: losses or largest gradients.
        ids: int64[B], of the global batch.

    Returns:
        Those whose value is not finite; if all are, those of the largest one.
    """
    by_leaf = ids.reshape(len(values), -1)
    is_bad = ~np.isfinite(values)
    if not is_bad.any():
        is_bad = values == values.max()
    return tuple(sorted(set(by_leaf[is_bad].reshape(-1).tolist())))


def dropped(config: IncidentConfig, record: StepRecord, suspect_ids: tuple[int, ...]) -> StepRecord:
    """`record` of a step whose update was dropped, with what is to be done about it."""
    is_finite = bool(np.isfinite(record.loss) and np.isfinite(record.grad_norm))
    reason = (
        f"the loss {record.loss:.4g} lies more than {config.spike_sigmas} standard deviations "
        "above those before it"
        if is_finite
        else f"loss {record.loss:.4g} and gradient norm {record.grad_norm:.4g} are not both finite"
    )
    rolls_back = config.policy == "rollback"
    return dataclasses.replace(
        record,
        verdict="rollback" if rolls_back else "skipped",
        reason=reason,
        rollback_to=max(0, record.step - config.rollback_steps) if rolls_back else None,
        suspect_ids=suspect_ids,
    )
