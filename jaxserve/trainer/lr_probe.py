"""Probes of a learning rate that tunes itself, over the logical world.

A probe asks whether all the updates since the last one should have been longer: it measures the
loss along the way from the parameters of then to those of now, on batches of a stream of its own.
It needs no gradient, only the parameters of then, which the state holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.trainer.device_state import DeviceState
from jaxserve.trainer.step_config import FloatDtype
from jaxserve.trainer.world import LogicalWorld
from schedules import TunerConfig, TunerState, probe_positions, record_losses

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
    param_dtype: FloatDtype,
    states: Sequence[DeviceState],
    loss_at: Callable[[list[jax.Array]], list[jax.Array]],
) -> float:
    """Measures one batch at all rates, and puts what follows into `states`.

    Beside the state this takes memory for one copy of the parameters, and evaluates the loss
    once for each of `config.rate_multiples`.

    Args:
        config: the tuner's.
        param_dtype: of the parameters as the model reads them.
        states: of the local devices; their next probe starts here.
        loss_at: parameters in vectors as the devices hold them, to the loss on each device.

    Returns:
        Seconds that it took, from the end of the updates before it.
    """
    jax.block_until_ready([state.moments.master for state in states])
    begin_s = time.monotonic()
    losses: list[list[jax.Array]] = [[] for _ in states]
    for multiple in config.rate_multiples:
        moved = [
            _on_path(param_dtype, _start_of(state), state.moments.master, np.float32(multiple))
            for state in states
        ]
        for own, loss in zip(losses, loss_at(moved), strict=True):
            own.append(loss)
    for state, own in zip(states, losses, strict=True):
        recorded = _recorded(config, _tuner_of(state), tuple(own))
        state.decision = state.decision._replace(tuner=recorded)
        state.start = jnp.copy(state.moments.master)  # updates take over the memory of the master
    jax.block_until_ready([state.start for state in states])
    jax.block_until_ready([state.decision for state in states])
    return time.monotonic() - begin_s


@partial(jax.jit, static_argnums=0)
def _on_path(
    param_dtype: FloatDtype, start: jax.Array, now: jax.Array, multiple: jax.Array
) -> jax.Array:
    """Parameters as updates at `multiple` times the rate would have made them, float32[blocks,
    block_size] -> `param_dtype`."""
    return (start + multiple * (now - start)).astype(param_dtype)


@partial(jax.jit, static_argnums=0)
def _recorded(config: TunerConfig, tuner: TunerState, losses: tuple[jax.Array, ...]) -> TunerState:
    recorded: TunerState = record_losses(tuner, jnp.stack(losses), config)
    return recorded


def _tuner_of(state: DeviceState) -> TunerState:
    assert state.decision.tuner is not None
    return state.decision.tuner


def _start_of(state: DeviceState) -> jax.Array:
    assert state.start is not None
    return state.start
