"""Runs whose learning rate is tuned as they go, through the interface that users have."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import schedules
from tools.schedule_study.fixed_runs import CHUNK
from tools.schedule_study.task import PROBE_BATCHES, Task

BACKWARD_COST = 2
"""A backward pass in terms of forward passes: two products for each of the forward's."""


@dataclass(frozen=True)
class TunedResult:
    """How one tuned run ended, and what its probes cost.

    Attributes:
        held_out_loss: At the end.
        peak: The rate that auto holds; the highest of the other variants.
        ramp_steps: Updates before the last probe.
        rates: float32[T], of every update.
        train_losses: float32[T].
        num_probe_forwards: Forward passes of probes, each of one train batch's size.
        train_s: Time of the train steps.
        probe_s: Time of the probes.
    """

    held_out_loss: float
    peak: float
    ramp_steps: int
    rates: np.ndarray
    train_losses: np.ndarray
    num_probe_forwards: int
    train_s: float
    probe_s: float

    @property
    def overhead_by_passes(self) -> float:
        """Passes of the probes over those of the train steps."""
        return self.num_probe_forwards / ((1 + BACKWARD_COST) * len(self.rates))

    @property
    def overhead_by_time(self) -> float:
        """Time of the probes over that of the train steps."""
        return self.probe_s / self.train_s

    def values(self) -> dict[str, Any]:
        """For JSON, with the curves as means over `CHUNK` updates."""
        return {
            "held_out_loss": self.held_out_loss,
            "peak": self.peak,
            "ramp_steps": self.ramp_steps,
            "num_probe_forwards": self.num_probe_forwards,
            "overhead_by_passes": self.overhead_by_passes,
            "overhead_by_time": self.overhead_by_time,
            "train_losses": _chunk_means(self.train_losses),
            "rates": _chunk_means(self.rates),
        }


class TunedRuns:
    """Compiled once, run for several seeds."""

    def __init__(
        self, task: Task, base: optax.GradientTransformation, config: schedules.TunerConfig
    ) -> None:
        self.task, self.config = task, config
        self.optimizer = optax.chain(base, schedules.lr_tuner(config))
        self.path_direction = jax.jit(schedules.path_direction)
        self.copied = jax.jit(lambda params: jax.tree.map(jnp.copy, params))
        self.probe_step = schedules.probe_step(task.loss, config)
        self.train_step = jax.jit(self._train, donate_argnums=(0, 1))
        self.probe_batch = jax.jit(task.probe_batch)

    def run(self, seed: int) -> TunedResult:
        """One run. Probes are timed from a finished update to their own end."""
        self._compile()
        params = self.task.initial_params(seed)
        state = self.optimizer.init(params)
        start = self.copied(params)
        rates, losses, num_probes, probe_s, ramp_steps = [], [], 0, 0.0, 0
        started_s = time.perf_counter()
        for step in range(self.config.total_steps):
            for position in schedules.probe_positions(state, self.config, step):
                jax.block_until_ready(params)
                begun_s = time.perf_counter()
                batch = self.probe_batch(seed, step, position)
                path = self.path_direction(params, start, state)
                state = self.probe_step(start, state, path, batch)
                start = jax.block_until_ready(self.copied(params))
                probe_s += time.perf_counter() - begun_s
                num_probes, ramp_steps = num_probes + 1, step
            params, state, loss, rate = self.train_step(params, state, seed, step)
            losses.append(loss)
            rates.append(rate)
        jax.block_until_ready(params)
        whole_s = time.perf_counter() - started_s
        trace = np.asarray(jax.device_get(rates), np.float32)
        is_auto = self.config.variant == "auto"
        return TunedResult(
            held_out_loss=float(jax.jit(self.task.loss)(params, self.task.held_out)),
            peak=float(schedules.tuner_state(state).peak if is_auto else trace.max()),
            ramp_steps=ramp_steps,
            rates=trace,
            train_losses=np.asarray(jax.device_get(losses), np.float32),
            num_probe_forwards=num_probes * len(self.config.rate_multiples) * PROBE_BATCHES,
            train_s=whole_s - probe_s,
            probe_s=probe_s,
        )

    def _compile(self) -> None:
        """Calls everything once, so that no compilation is timed."""
        params = self.task.initial_params(0)
        state = self.optimizer.init(params)
        path = self.path_direction(self.copied(params), params, state)
        state = self.probe_step(params, state, path, self.probe_batch(0, 0, 0))
        jax.block_until_ready(self.train_step(params, state, 0, 0))

    def _train(self, params: Any, state: Any, seed: Any, step: Any) -> tuple[Any, ...]:
        rate = schedules.current_lr(state)
        loss, grads = jax.value_and_grad(self.task.loss)(params, self.task.train_batch(seed, step))
        updates, state = self.optimizer.update(grads, state, params, value=loss)
        return optax.apply_updates(params, updates), state, loss, rate


def _chunk_means(values: np.ndarray) -> list[float]:
    means = values.reshape(-1, CHUNK).mean(axis=1)
    return [float(f"{mean:.5g}") for mean in means]
