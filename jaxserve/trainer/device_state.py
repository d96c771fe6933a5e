"""A run's state on the devices of one process, and its way to and from a buffer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.decision import DecisionSpec, DecisionState, initial_decision_state
from jaxserve.trainer.exchange import Exchange
from jaxserve.trainer.flat_vector import FlatVector
from jaxserve.trainer.optimizer import Moments, OptimizerState, optimizer_state
from jaxserve.trainer.shard_gradient import Tree, named_leaves
from jaxserve.trainer.state_layout import PARAMS, Buffer, Scalar, StateLayout
from jaxserve.trainer.step_config import OptimizerConfig, Sharding
from jaxserve.trainer.world import Range

EMA = "ema"
PROBE_START = "probe_start"
NEXT_STEP = "progress/next_step"
NUM_TOKENS = "progress/num_tokens"
DECISION = "decision"


@dataclass
class DeviceState:
    """What one device holds between two steps.

    Attributes:
        device: the device.
        blocks: the blocks of the vectors that it holds; beyond the vector's end they are zero.
        moments: master parameters, the optimizer's state and the average.
        decision: what decisions remember.
        start: of a rate that tunes itself, the master parameters when it was last probed; else
            None. Updates since then are what the next probe measures.
    """

    device: jax.Device
    blocks: Range
    moments: Moments
    decision: DecisionState
    start: jax.Array | None


class StateCarrier:
    """Moves states between buffers and devices.

    Args:
        flat: the vector of parameters.
        optimizer: which moments there are.
        decision: which memory decisions have.
        exchange: devices and their chunks.
        sharding: what each device holds.
        task_arrays: what a task keeps beside, such as the order of its examples: name -> what it
            begins with, in a shape and dtype that stay.
    """

    def __init__(
        self,
        flat: FlatVector,
        optimizer: OptimizerConfig,
        decision: DecisionSpec,
        exchange: Exchange,
        sharding: Sharding,
        task_arrays: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        self._task_arrays = dict(task_arrays or {})
        self._optimizer = optimizer_state(optimizer)
        self._initial_decision = initial_decision_state(decision)
        self._decision_names = _names(self._initial_decision)
        self._exchange = exchange
        self._is_split = sharding != "replicated"
        layout = _layout(
            flat, self._optimizer, self._initial_decision, optimizer.ema_decay is not None
        )
        scalars = (
            Scalar(name, one.shape, one.dtype.name) for name, one in self._task_arrays.items()
        )
        self.layout = dataclasses.replace(layout, scalars=(*layout.scalars, *scalars))

    def initial_buffer(self, params: Tree) -> npt.NDArray[np.uint8]:
        """The buffer of a fresh run that starts with `params`."""
        layout = self.layout
        buffer = np.zeros(layout.size_bytes, np.uint8)
        leaves = named_leaves(params)
        for name in (one for one in (PARAMS, EMA, PROBE_START) if one in layout.vectors):
            values = layout.vector(buffer, name).reshape(-1)
            for leaf in layout.flat.leaves:
                first = layout.flat.offsets[leaf.name]
                values[first : first + leaf.size] = np.asarray(leaves[leaf.name]).reshape(-1)
        for name, start in self._optimizer.vectors.items():
            layout.vector(buffer, name).reshape(-1)[: layout.flat.num_values] = start
        for name, value in self._optimizer.scalars.items():
            layout.scalar(buffer, name)[...] = value
        for name, leaf in zip(
            self._decision_names, jax.tree.leaves(self._initial_decision), strict=True
        ):
            layout.scalar(buffer, name)[...] = np.asarray(leaf)
        for name, array in self._task_arrays.items():
            layout.scalar(buffer, name)[...] = array
        return buffer

    def task_arrays(self, buffer: Buffer) -> dict[str, npt.NDArray[Any]]:
        """Copies of what the task keeps."""
        return {name: np.array(self.layout.scalar(buffer, name)) for name in self._task_arrays}

    def load(self, buffer: Buffer) -> list[DeviceState]:
        """The states of all local devices, in order. The buffer may be changed afterwards."""
        return [self._load_device(buffer, place) for place in self._exchange.local]

    def next_step(self, buffer: Buffer) -> int:
        """The step to go on with."""
        return int(self.layout.scalar(buffer, NEXT_STEP))

    def num_tokens(self, buffer: Buffer) -> int:
        """Targets that counted so far."""
        return int(self.layout.scalar(buffer, NUM_TOKENS))

    def store(
        self,
        buffer: Buffer,
        states: Sequence[DeviceState],
        next_step: int,
        num_tokens: int,
        task_arrays: Mapping[str, npt.NDArray[Any]] | None = None,
    ) -> None:
        """Writes what `ranges` names; `task_arrays` must have the task's own."""
        for place, state in zip(self._exchange.local, states, strict=True):
            chunk = self._exchange.chunk_of(place)
            for name, array in self._vectors_of(state).items():
                first = chunk.first - state.blocks.first
                held = np.asarray(array)[first : first + len(chunk)]
                self.layout.vector(buffer, name)[chunk.first : chunk.end] = held
        if 0 in self._exchange.local:
            self._store_scalars(buffer, states[0], next_step, num_tokens)
            for name in self._task_arrays:
                self.layout.scalar(buffer, name)[...] = (task_arrays or {})[name]

    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The (offset, size) in bytes of what this process stores: whole chunks of blocks, and
        for the process of the first device the scalars and whatever lies beside them."""
        layout = self.layout
        block_bytes = layout.flat.block_size * 4
        parts = []
        for place in self._exchange.local:
            chunk = self._exchange.chunk_of(place)
            if len(chunk):
                parts += [
                    (layout.offsets[name] + chunk.first * block_bytes, len(chunk) * block_bytes)
                    for name in layout.vectors
                ]
        if 0 in self._exchange.local:
            first = len(layout.vectors) * layout.vector_bytes
            parts.append((first, layout.size_bytes - first))
        return tuple(sorted(parts))

    def _load_device(self, buffer: Buffer, place: int) -> DeviceState:
        layout, device = self.layout, self._exchange.devices[place]
        num_blocks = layout.flat.num_blocks
        chunk = self._exchange.chunk_of(place) if self._is_split else Range(0, num_blocks)
        held = self._exchange.chunk_blocks if self._is_split else num_blocks

        def vector(name: str) -> jax.Array:
            # A copy: jax may otherwise keep the buffer's own memory, and later write to it.
            values = np.zeros((held, layout.flat.block_size), np.float32)
            values[: len(chunk)] = layout.vector(buffer, name)[chunk.first : chunk.end]
            on_device: jax.Array = jax.device_put(values, device)
            return on_device

        def scalar(name: str) -> jax.Array:
            on_device: jax.Array = jax.device_put(np.array(layout.scalar(buffer, name)), device)
            return on_device

        leaves = [
            vector(name) if name in self._optimizer.vectors else scalar(name)
            for name in self._optimizer.names
        ]
        opt_state = jax.tree.unflatten(self._optimizer.structure, leaves)
        ema = vector(EMA) if EMA in layout.vectors else None
        decision = jax.tree.unflatten(
            jax.tree.structure(self._initial_decision),
            [scalar(name) for name in self._decision_names],
        )
        moments = Moments(vector(PARAMS), opt_state, ema)
        blocks = Range(chunk.first, chunk.first + held)
        start = vector(PROBE_START) if PROBE_START in layout.vectors else None
        return DeviceState(device, blocks, moments, decision, start)

    def _vectors_of(self, state: DeviceState) -> dict[str, jax.Array]:
        moments = state.moments
        leaves = jax.tree.leaves(moments.opt_state)
        named = dict(zip(self._optimizer.names, leaves, strict=True))
        vectors = {name: named[name] for name in self._optimizer.vectors}
        if moments.ema is not None:
            vectors[EMA] = moments.ema
        if state.start is not None:
            vectors[PROBE_START] = state.start
        return {PARAMS: moments.master, **vectors}

    def _store_scalars(
        self, buffer: Buffer, state: DeviceState, next_step: int, num_tokens: int
    ) -> None:
        leaves = jax.tree.leaves(state.moments.opt_state)
        named = dict(zip(self._optimizer.names, leaves, strict=True))
        values: dict[str, Any] = {name: named[name] for name in self._optimizer.scalars}
        values |= dict(zip(self._decision_names, jax.tree.leaves(state.decision), strict=True))
        values |= {NEXT_STEP: np.int64(next_step), NUM_TOKENS: np.int64(num_tokens)}
        for name, value in values.items():
            self.layout.scalar(buffer, name)[...] = np.asarray(value)


def _layout(
    flat: FlatVector, optimizer: OptimizerState, decision: DecisionState, has_ema: bool
) -> StateLayout:
    vectors = (PARAMS, *optimizer.vectors)
    if has_ema:
        vectors += (EMA,)
    if decision.tuner is not None:
        vectors += (PROBE_START,)
    scalars = [*optimizer.scalar_specs()]
    for name, leaf in zip(_names(decision), jax.tree.leaves(decision), strict=True):
        scalars.append(Scalar(name, leaf.shape, leaf.dtype.name))
    scalars += [Scalar(NEXT_STEP, (), "int64"), Scalar(NUM_TOKENS, (), "int64")]
    return StateLayout(flat, vectors, tuple(scalars))


def _names(decision: DecisionState) -> tuple[str, ...]:
    paths = jax.tree_util.tree_leaves_with_path(decision)
    return tuple("/".join([DECISION, *(key.name for key in path)]) for path, _ in paths)
