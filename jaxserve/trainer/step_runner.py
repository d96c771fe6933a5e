"""A training step on any number of devices, always with the same bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.trainer.batches import Batch, BatchReader, Dataset
from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.trainer.decision import Decision, DecisionSpec, Rate, decide
from jaxserve.trainer.device_state import DeviceState, StateCarrier
from jaxserve.trainer.exchange import Exchange, add
from jaxserve.trainer.gradient_tree import Node, TreeSum
from jaxserve.trainer.optimizer import UpdateSpec, apply_update
from jaxserve.trainer.shard_gradient import (
    GradientSpec,
    Tree,
    abstract_trainable,
    flat_vector_of,
    init_trainable,
    shard_gradient,
    unflatten,
)
from jaxserve.trainer.state_layout import Buffer, StateLayout
from jaxserve.trainer.step_config import FloatDtype, StepConfig
from jaxserve.trainer.step_record import EvalRecord, StepRecord
from jaxserve.trainer.world import LogicalWorld, Range
from models.config import ModelConfig
from models.lora import LoraConfig


class StepRunner:
    """See `jaxserve.trainer.step_record.Runner`, which this is.

    Args:
        world: the logical world.
        config: how a step computes.
        rate: the learning rate's schedule, or a tuner's settings.
        model: the model's config.
        dataset: training examples.
        devices: all devices of all processes in order; unless given, all there are.
        weights: relative speeds of the devices; equal unless given.
        quarantined: example ids that are never used.
        initial_params: gives what a fresh run starts from, a float32 tree like
            `init_trainable`'s; unless given, that.
        lora: trains adapters on `base_params` instead of parameters.
        base_params: with `lora`, the model's tree.

    Raises:
        ConfigError: settings that do not fit together.
    """

    def __init__(
        self,
        *,
        world: LogicalWorld,
        config: StepConfig,
        rate: Rate,
        model: ModelConfig,
        dataset: Dataset,
        devices: Sequence[jax.Device] | None = None,
        weights: Sequence[float] | None = None,
        quarantined: Iterable[int] = (),
        initial_params: Callable[[], Tree] | None = None,
        lora: LoraConfig | None = None,
        base_params: Tree | None = None,
    ) -> None:
        if (lora is None) != (base_params is None):
            raise ConfigError(
                "lora: adapters need the parameters of a base model, and only they do"
            )
        self.world = world
        self.config = config
        all_devices = tuple(jax.devices() if devices is None else devices)
        self.num_devices = len(all_devices)
        self.ranges: tuple[Range, ...] = world.ranges_of(self.num_devices, weights)
        flat = flat_vector_of(abstract_trainable(model, lora), config.optimizer.decayed)
        self._exchange = Exchange(
            all_devices, _leaf_ranges(world, self.ranges), flat, world.num_leaves
        )
        self._gradient = GradientSpec(
            model=model,
            flat=flat,
            compute_dtype=config.compute_dtype,
            param_dtype=config.param_dtype,
            dropout=config.dropout,
            remat=config.remat,
            rng_seed=world.rng_seed,
            lora=lora,
        )
        self._update = UpdateSpec(config.optimizer, flat, config.param_dtype)
        self._decision = DecisionSpec(rate, config.incidents, config.optimizer.clip_norm)
        self._carrier = StateCarrier(
            flat, config.optimizer, self._decision, self._exchange, config.sharding
        )
        self._initial_params = initial_params or (
            lambda: init_trainable(model, lora, world.rng_seed)
        )
        local = self._local_leaves = [
            list(range(part.first, part.end))
            for part in (self._exchange.leaf_ranges[place] for place in self._exchange.local)
        ]
        sampler = IndexSampler(dataset.num_examples, world.data_seed, quarantined)
        self._reader = BatchReader(
            world, dataset, sampler, [leaf for leaves in local for leaf in leaves]
        )
        self._base = [
            None if base_params is None else _placed(base_params, config.param_dtype, device)
            for device in self._local_devices
        ]
        self._states: list[DeviceState] = []
        self._params: list[Tree] | None = None
        self._copies: list[jax.Array] | None = None
        self._next_step = 0
        self._num_tokens = 0

    @property
    def layout(self) -> StateLayout:
        """Segments of a state's buffer."""
        return self._carrier.layout

    def load_state(self, buffer: Buffer | None) -> int:
        """Takes over a state and returns the next step; None: a fresh one at step 0.

        Raises:
            StateMismatch: the buffer has another size than the layout's.
        """
        if buffer is None:
            buffer = self._carrier.initial_buffer(self._initial_params())
        self._states = self._carrier.load(buffer)
        self._params = self._copies = None
        self._next_step = self._carrier.next_step(buffer)
        self._num_tokens = self._carrier.num_tokens(buffer)
        return self._next_step

    def store_state(self, buffer: Buffer) -> None:
        """Writes this process's part of the state, the bytes that `state_ranges` names."""
        self._carrier.store(buffer, self._states, self._next_step, self._num_tokens)

    def state_ranges(self) -> tuple[tuple[int, int], ...]:
        """The (offset, size) in bytes of what `store_state` writes."""
        return self._carrier.ranges()

    def run_step(self, step: int) -> StepRecord:
        """Computes one step.

        Raises:
            ValueError: it is not the state's next one.
        """
        if not self._states or step != self._next_step:
            raise ValueError(f"step {step}, but the state is at step {self._next_step}")
        world = self.world
        batch = self._reader.read(world.first_index(step), world.first_index(step + 1))
        sums, tails = self._shard_gradients(batch, step)
        chunks, all_tails = self._exchange.reduce(sums, tails)
        del sums, tails
        squares = self._exchange.norm_squares(chunks)
        decisions: list[Decision] = []
        for state, square, tail in zip(self._states, squares, all_tails, strict=True):
            decision, state.decision = decide(
                self._decision, square, tail, state.decision, np.int32(step)
            )
            decisions.append(decision)
        self._apply(chunks, decisions)
        self._next_step = step + 1
        self._num_tokens += batch.num_tokens
        return self._record(step, batch, decisions[0])

    def evaluate(self) -> EvalRecord:
        """Loss over the evaluation set, without dropout. Changes nothing."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the reading thread."""
        self._reader.close()

    @property
    def _local_devices(self) -> list[jax.Device]:
        return [self._exchange.devices[place] for place in self._exchange.local]

    def _whole_params(self) -> list[Tree]:
        """The parameters of every local device as the model reads them."""
        if self._params is None:
            vectors = self._copies or [state.moments.master for state in self._states]
            if self.config.sharding != "replicated":
                vectors = self._exchange.gather(vectors)
            self._params = [
                unflatten(self._gradient.flat, self.config.param_dtype, vector)
                for vector in vectors
            ]
        return self._params

    def _shard_gradients(
        self, batch: Batch, step: int
    ) -> tuple[list[TreeSum[jax.Array]], list[list[jax.Array]]]:
        """Sums of the gradients of each local device's leaves, and their tails."""
        params = self._whole_params()
        sums: list[TreeSum[jax.Array]] = [TreeSum(add) for _ in self._states]
        tails: list[list[jax.Array]] = [[] for _ in self._states]
        num_tokens = np.float32(max(batch.num_tokens, 1))
        for turn in range(max(map(len, self._local_leaves))):
            for slot, leaves in enumerate(self._local_leaves):
                if turn >= len(leaves):
                    continue
                leaf = leaves[turn]
                rows = jax.device_put(batch.packed[leaf], self._states[slot].device)
                vector, tail = shard_gradient(
                    self._gradient, params[slot], self._base[slot], rows, np.int32(step), num_tokens
                )
                sums[slot].push(Node(0, leaf), vector)
                tails[slot].append(tail)
        if self.config.sharding == "fsdp":
            self._params = None
        return sums, tails

    def _apply(self, chunks: Sequence[jax.Array], decisions: Sequence[Decision]) -> None:
        gradients = list(chunks)
        if self.config.sharding == "replicated":
            gradients = self._exchange.gather(chunks)
        copies: list[jax.Array] = []
        for state, gradient, decision in zip(self._states, gradients, decisions, strict=True):
            state.moments, copy = apply_update(
                self._update, state.moments, gradient, decision, np.int32(state.blocks.first)
            )
            if copy is not None:
                copies.append(copy)
        self._params = None
        self._copies = copies or None

    def _record(self, step: int, batch: Batch, decision: Decision) -> StepRecord:
        host: Decision = jax.device_get(decision)
        first = self.world.first_index(step)
        return StepRecord(
            step=step,
            loss=np.float32(host.loss),
            grad_norm=np.float32(host.grad_norm),
            lr=np.float32(host.lr),
            first_index=first,
            last_index=first + self.world.global_batch_size - 1,
            ids_sha256=batch.ids_sha256(),
            num_tokens=batch.num_tokens,
            verdict="applied" if host.applied else "skipped",
            data_wait_s=batch.wait_s,
        )


def _leaf_ranges(world: LogicalWorld, ranges: Sequence[Range]) -> list[Range]:
    size = world.leaves_per_shard
    return [Range(part.first * size, part.end * size) for part in ranges]


def _placed(params: Tree, dtype: FloatDtype, device: jax.Device) -> Tree:
    placed: Tree = jax.device_put(
        jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params), device
    )
    return placed
