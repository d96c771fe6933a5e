"""UpdateState: parameters and optimizer on this process's devices, and how a gradient moves them.

What a task computes its gradients from is its own; everything from the gradient on is the same for
all tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.decision import Decision, DecisionSpec, Rate, decide
from jaxserve.trainer.device_state import DeviceState, StateCarrier
from jaxserve.trainer.exact_gradient import Gradients
from jaxserve.trainer.exchange import Exchange
from jaxserve.trainer.flat_vector import FlatVector
from jaxserve.trainer.optimizer import UpdateSpec, apply_update
from jaxserve.trainer.params_digest import params_digest
from jaxserve.trainer.shard_gradient import Tree, unflatten
from jaxserve.trainer.state_layout import Buffer, StateLayout
from jaxserve.trainer.step_config import StepConfig


class UpdateState:
    """The state of a run between two steps.

    Args:
        flat: the vector of parameters.
        exchange: devices and their chunks.
        config: optimizer, precision and sharding.
        rate: the learning rate's schedule.
        task_arrays: what the task keeps beside; see `StateCarrier`.

    Attributes:
        task_arrays: the task's own, which it replaces after each step.
        next_step: the step that the state is for.
    """

    def __init__(
        self,
        flat: FlatVector,
        exchange: Exchange,
        config: StepConfig,
        rate: Rate,
        task_arrays: Mapping[str, npt.NDArray[Any]],
    ) -> None:
        self._flat = flat
        self._exchange = exchange
        self._config = config
        self._decision = DecisionSpec(rate, config.incidents, config.optimizer.clip_norm)
        self._update = UpdateSpec(config.optimizer, flat, config.param_dtype)
        self._carrier = StateCarrier(
            flat, config.optimizer, self._decision, exchange, config.sharding, task_arrays
        )
        self._states: list[DeviceState] = []
        self._params: list[Tree] | None = None
        self._copies: list[jax.Array] | None = None
        self._num_examples = 0
        self.task_arrays: Mapping[str, npt.NDArray[Any]] = dict(task_arrays)
        self.next_step = 0

    @property
    def layout(self) -> StateLayout:
        """Segments of a state's buffer."""
        return self._carrier.layout

    def initial_buffer(self, params: Tree) -> npt.NDArray[np.uint8]:
        """The state of a fresh run that starts with `params`."""
        return self._carrier.initial_buffer(params)

    def load(self, buffer: Buffer) -> int:
        """Takes over a state and returns the next step."""
        self._states = self._carrier.load(buffer)
        self._params = self._copies = None
        self.task_arrays = self._carrier.task_arrays(buffer)
        self.next_step = self._carrier.next_step(buffer)
        self._num_examples = self._carrier.num_tokens(buffer)
        return self.next_step

    def store(self, buffer: Buffer) -> None:
        """Writes this process's part of the state."""
        self._carrier.store(
            buffer, self._states, self.next_step, self._num_examples, self.task_arrays
        )

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The (offset, size) in bytes of what `store` writes."""
        return self._carrier.ranges()

    def params(self) -> list[Tree]:
        """The parameters of every local device as the model reads them."""
        if self._params is None:
            held = self._copies or [state.moments.master for state in self._states]
            whole = held
            if self._config.sharding != "replicated":
                whole = self._exchange.gather(held)
            dtype = self._config.param_dtype
            self._params = [unflatten(self._flat, dtype, vector) for vector in whole]
        return self._params

    def drop_params(self) -> None:
        """With `fsdp`, frees the whole parameters once gradients are computed."""
        if self._config.sharding == "fsdp":
            self._params = None

    def update(self, gradients: Gradients, step: int, num_examples: int) -> Decision:
        """One update; afterwards the state is that of the next step. The decision, on the host."""
        chunks, losses = gradients
        squares = self._exchange.norm_squares(chunks)
        parts: Sequence[jax.Array] = chunks
        if self._config.sharding == "replicated":
            parts = self._exchange.gather(chunks)
        copies, decisions = [], []
        for place, state in enumerate(self._states):
            decision, state.decision = decide(
                self._decision, squares[place], losses[place], state.decision, np.int32(step)
            )
            state.moments, copy = apply_update(
                self._update, state.moments, parts[place], decision, np.int32(state.blocks.first)
            )
            decisions.append(decision)
            if copy is not None:
                copies.append(copy)
        self._params, self._copies = None, copies or None
        self.next_step = step + 1
        self._num_examples += num_examples
        on_host: Decision = jax.device_get(decisions[0])
        return on_host

    def digest(self, step: int) -> str | None:
        """Of the parameters, at the steps that have one."""
        every = self._config.digest_every
        if not every or step % every:
            return None
        is_split = self._config.sharding != "replicated"
        return params_digest(self._exchange, self._states, is_split=is_split)
