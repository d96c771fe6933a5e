"""Probes of a learning rate that tunes itself, over the logical world.

They use the gradient of the step that they come before, and batches of a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.trainer.decision import Decision
from jaxserve.trainer.device_state import DeviceState
from jaxserve.trainer.optimizer import UpdateSpec, trial_master
from jaxserve.trainer.world import LogicalWorld
from schedules import TunerConfig, TunerState, probe_positions, record_losses, trial_rates

PROBE_STREAM = 1 << 40
"""Added to the seed of the order of examples: probes see other batches than updates do."""


def probe_seed(world: LogicalWorld) -> int:
    """Seed of the order of the probes' examples."""
    return world.data_seed + PROBE_STREAM


def positions_before(config: TunerConfig, state: DeviceState, step: int) -> range:
    """Which batches of a probe are to be measured before the update of `step`."""
    return probe_positions(state.decision.tuner, config, step)


def first_probe_index(world: LogicalWorld, config: TunerConfig, step: int, position: int) -> int:
    """Number of the first example, in the probes' order, of a probe's batch."""
    return (step * config.num_batches + position) * world.global_batch_size


def probe(
    config: TunerConfig,
    update: UpdateSpec,
    states: Sequence[DeviceState],
    gradients: Sequence[jax.Array],
    decisions: Sequence[Decision],
    loss_at: Callable[[list[jax.Array]], list[jax.Array]],
) -> None:
    """Measures one batch at all rates, and puts what follows into `states`.

    Args:
        config: the tuner's.
        update: the update whose direction is tried.
        states: of the local devices.
        gradients: of the step to come, as `apply_update` takes them.
        decisions: of the step to come, for the factor of the gradient.
        loss_at: parameters in vectors as the devices hold them, to the loss on each device.
    """
    tuners = [_tuner_of(state) for state in states]
    rates = [_rates(config, tuner) for tuner in tuners]
    losses: list[list[jax.Array]] = [[] for _ in states]
    for place in range(len(config.rate_multiples)):
        moved = [
            trial_master(
                update,
                state.moments,
                gradient,
                decision,
                np.int32(state.blocks.first),
                rate,
                np.int32(place),
            )
            for state, gradient, decision, rate in zip(
                states, gradients, decisions, rates, strict=True
            )
        ]
        for own, loss in zip(losses, loss_at(moved), strict=True):
            own.append(loss)
    for state, tuner, own in zip(states, tuners, losses, strict=True):
        recorded = _recorded(config, tuner, tuple(own))
        state.decision = state.decision._replace(tuner=recorded)


@partial(jax.jit, static_argnums=0)
def _rates(config: TunerConfig, tuner: TunerState) -> jax.Array:
    return trial_rates(tuner, config)


@partial(jax.jit, static_argnums=0)
def _recorded(config: TunerConfig, tuner: TunerState, losses: tuple[jax.Array, ...]) -> TunerState:
    recorded: TunerState = record_losses(tuner, jnp.stack(losses), config)
    return recorded


def _tuner_of(state: DeviceState) -> TunerState:
    assert state.decision.tuner is not None
    return state.decision.tuner
