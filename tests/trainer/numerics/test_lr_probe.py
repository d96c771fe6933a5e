"""A probe measures the way of the updates since the last one."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.trainer.decision import DecisionSpec, initial_decision_state
from jaxserve.trainer.device_state import DeviceState
from jaxserve.trainer.lr_probe import probe
from jaxserve.trainer.optimizer import Moments
from jaxserve.trainer.step_config import IncidentConfig
from jaxserve.trainer.world import Range
from schedules import TunerConfig


def test_the_optimum_is_one_of_the_whole_path() -> None:
    config = TunerConfig(total_steps=100, initial_lr=0.01)
    decision = initial_decision_state(DecisionSpec(config, IncidentConfig(), None))
    master = jnp.full((1, 4), 3.0)
    state = DeviceState(
        device=jax.devices()[0],
        blocks=Range(0, 1),
        moments=Moments(master, (), None),
        decision=decision,
        start=jnp.ones((1, 4)),
    )
    measured: list[float] = []

    def loss_at(held: list[jax.Array]) -> list[jax.Array]:
        measured.append(float(held[0][0, 0]))
        return [jnp.sum((vector - 4.0) ** 2) for vector in held]

    seconds = probe(config, "float32", [state], loss_at)
    assert measured == [1.0, 2.0, 3.0, 5.0]  # from 1 over 3, at 0, 0.5, 1 and 2 times the way
    assert seconds > 0
    tuner = state.decision.tuner
    assert tuner is not None
    a, b, _ = np.asarray(tuner.coefficients)
    assert -b / (2 * a) == pytest.approx(1.5)  # 4 lies 1.5 times as far from 1 as 3 does
    assert int(tuner.num_probes) == 1
    assert state.start is not None
    np.testing.assert_array_equal(state.start, master)
    master.delete()  # as an update does, which takes over its memory
    assert float(state.start[0, 0]) == 3.0
