"""A training step on any number of devices, always with the same bits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.errors import ConfigError
from jaxserve.trainer.batches import Batch, BatchReader, Dataset
from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.trainer.decision import Decision, DecisionSpec, DecisionState, Rate, decide
from jaxserve.trainer.device_state import DeviceState, StateCarrier
from jaxserve.trainer.evaluation import Packed, evaluate
from jaxserve.trainer.exact_gradient import ExactGradient, Gradients
from jaxserve.trainer.exchange import Exchange
from jaxserve.trainer.incidents import dropped, suspects_of
from jaxserve.trainer.leaf_losses import batch_loss
from jaxserve.trainer.lr_probe import first_probe_index, positions_before, probe, probe_seed
from jaxserve.trainer.optimizer import UpdateSpec, apply_update
from jaxserve.trainer.ordered_gradient import OrderedGradient
from jaxserve.trainer.params_digest import params_digest
from jaxserve.trainer.replay import check_replicas, digest
from jaxserve.trainer.shard_gradient import (
    GradientSpec,
    Tree,
    abstract_trainable,
    flat_vector_of,
    init_trainable,
    unflatten,
)
from jaxserve.trainer.state_layout import Buffer, StateLayout
from jaxserve.trainer.step_config import FloatDtype, StepConfig
from jaxserve.trainer.step_record import EvalRecord, StepRecord
from jaxserve.trainer.world import LogicalWorld, Range
from models.config import ModelConfig
from models.lora import LoraConfig
from schedules import TunerConfig


class StepRunner:
    """See `jaxserve.trainer.step_record.Runner`, which this is.

    Args:
        world: the logical world.
        config: how a step computes.
        rate: the learning rate's schedule, or a tuner's settings.
        model: the model's config.
        dataset: training examples.
        devices: all devices of all processes in order; unless given, all there are.
        eval_dataset: examples for `evaluate`.
        max_eval_examples: at most so many of them are used; None: all.
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
        eval_dataset: Dataset | None = None,
        max_eval_examples: int | None = None,
        devices: Sequence[jax.Device] | None = None,
        weights: Sequence[float] | None = None,
        quarantined: Iterable[int] = (),
        initial_params: Callable[[], Tree] | None = None,
        lora: LoraConfig | None = None,
        base_params: Tree | None = None,
    ) -> None:
        if config.replay_every and world.mode != "exact":
            raise ConfigError(f"replay_every needs mode 'exact', not {world.mode!r}; set it to 0")
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
        leaves = [leaf for own in local for leaf in own]
        banned = frozenset(quarantined)
        self._reader, self._probe_reader = (
            BatchReader(world, dataset, IndexSampler(dataset.num_examples, seed, banned), leaves)
            for seed in (world.data_seed, probe_seed(world))
        )
        self._exact = ExactGradient(self._gradient, self._exchange, self._reader.read_leaf)
        self._gradient_of: ExactGradient | OrderedGradient = self._exact
        if world.mode == "ordered":
            self._gradient_of = OrderedGradient(self._gradient, self._exchange)
        self._eval_dataset = eval_dataset
        self._max_eval_examples = max_eval_examples
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
    def on_exchange(self) -> Callable[[], None] | None:
        """See `Runner`."""
        return self._exact.on_exchange

    @on_exchange.setter
    def on_exchange(self, call: Callable[[], None] | None) -> None:
        self._exact.on_exchange = call

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
        probe_s = self._probe(step)
        world = self.world
        batch = self._reader.read(world.first_index(step))
        (chunks, losses), fault = self._gradients(batch, step)
        squares = self._exchange.norm_squares(chunks)
        gradients = list(chunks)
        if self.config.sharding == "replicated":
            gradients = self._exchange.gather(chunks)
        decided = self._decide(squares, losses, step)
        decisions = [decision for decision, _ in decided]
        for state, (_, remembered) in zip(self._states, decided, strict=True):
            state.decision = remembered
        self._apply(gradients, decisions)
        if self._checks(step) and self.config.sharding == "replicated":
            masters = [digest(state.moments.master) for state in self._states]
            check_replicas(self._exchange, masters, step)
        self._next_step = step + 1
        self._num_tokens += batch.num_tokens
        record = dataclasses.replace(
            self._record(step, batch, decisions[0], losses[0]),
            params_digest=self._digest(step),
            probe_s=probe_s,
        )
        return record if fault is None else dataclasses.replace(record, corrupted_device=fault)

    def evaluate(self) -> EvalRecord:
        """Loss over the evaluation set, without dropout. Changes nothing.

        Raises:
            ConfigError: there is none.
        """
        if self._eval_dataset is None:
            raise ConfigError("no evaluation set was given: prepare the data with --eval-fraction")
        params = self._whole_params()
        return evaluate(
            self.world,
            self._eval_dataset,
            [leaf for leaves in self._local_leaves for leaf in leaves],
            self._max_eval_examples,
            lambda packed, num_tokens: self._loss(params, packed, num_tokens)[0],
        )

    def close(self) -> None:
        """Ends the reading threads."""
        self._reader.close()
        self._probe_reader.close()

    @property
    def _local_devices(self) -> list[jax.Device]:
        return [self._exchange.devices[place] for place in self._exchange.local]

    def _whole_params(self) -> list[Tree]:
        """The parameters of every local device as the model reads them."""
        if self._params is None:
            held = self._copies or [state.moments.master for state in self._states]
            self._params = self._trees_of(held)
        return self._params

    def _trees_of(self, held: list[jax.Array]) -> list[Tree]:
        """Trees from vectors as the devices hold them."""
        whole = held if self.config.sharding == "replicated" else self._exchange.gather(held)
        return [unflatten(self._gradient.flat, self.config.param_dtype, vector) for vector in whole]

    def _loss(self, params: Sequence[Tree], packed: Packed, num_tokens: int) -> list[jax.Array]:
        return batch_loss(self._gradient, self._exchange, params, self._base, packed, num_tokens)

    def _gradients(self, batch: Batch, step: int) -> tuple[Gradients, str | None]:
        """Chunks and losses on each local device, and the device that was found wrong, if any."""
        params, fault = self._whole_params(), None
        if self._checks(step):
            gradients, fault = self._exact.checked(params, self._base, batch, step)
        else:
            gradients = self._gradient_of(params, self._base, batch, step)
        if self.config.sharding == "fsdp":
            self._params = None
        return gradients, fault

    def _checks(self, step: int) -> bool:
        every = self.config.replay_every
        return every > 0 and step % every == 0

    def _digest(self, step: int) -> str | None:
        every = self.config.digest_every
        if not every or step % every:
            return None
        is_split = self.config.sharding != "replicated"
        return params_digest(self._exchange, self._states, is_split=is_split)

    def _decide(
        self, squares: Sequence[jax.Array], losses: Sequence[jax.Array], step: int
    ) -> list[tuple[Decision, DecisionState]]:
        return [
            decide(self._decision, square, loss, state.decision, np.int32(step))
            for state, square, loss in zip(self._states, squares, losses, strict=True)
        ]

    def _probe(self, step: int) -> float:
        """What a rate that tunes itself measures before the update of `step`. Seconds spent."""
        config, seconds = self._decision.rate, 0.0
        if not isinstance(config, TunerConfig):
            return seconds
        for position in positions_before(config, self._states[0], step):
            index = first_probe_index(self.world, config, step, position)
            batch = self._probe_reader.read_once(index)
            if self.config.sharding == "fsdp":
                self._params = None

            def loss_at(held: list[jax.Array], batch: Batch = batch) -> list[jax.Array]:
                return self._loss(self._trees_of(held), batch.packed, batch.num_tokens)

            seconds += probe(config, self.config.param_dtype, self._states, loss_at)
        return seconds

    def _apply(self, gradients: Sequence[jax.Array], decisions: Sequence[Decision]) -> None:
        copies: list[jax.Array] = []
        for state, gradient, decision in zip(self._states, gradients, decisions, strict=True):
            state.moments, copy = apply_update(
                self._update, state.moments, gradient, decision, np.int32(state.blocks.first)
            )
            if copy is not None:
                copies.append(copy)
        self._params = None
        self._copies = copies or None

    def _record(self, step: int, batch: Batch, decision: Decision, losses: jax.Array) -> StepRecord:
        host: Decision = jax.device_get(decision)
        first = self.world.first_index(step)
        record = StepRecord(
            step=step,
            loss=np.float32(host.loss),
            grad_norm=np.float32(host.grad_norm),
            lr=np.float32(host.lr),
            first_index=first,
            last_index=first + self.world.global_batch_size - 1,
            ids_sha256=batch.ids_sha256(),
            num_tokens=batch.num_tokens,
            data_wait_s=batch.wait_s,
        )
        if host.applied:
            return record
        return dropped(self.config.incidents, record, self._suspects(record, batch, losses))

    def _suspects(self, record: StepRecord, batch: Batch, losses: jax.Array) -> tuple[int, ...]:
        """Ids that may have caused an incident: of a spike, all of the batch."""
        if np.isfinite(record.loss) and np.isfinite(record.grad_norm):
            return tuple(sorted(set(batch.ids.tolist())))
        if not np.isfinite(record.loss):
            return suspects_of(np.asarray(losses)[:, 0], batch.ids)
        # The update was dropped, so these are still the parameters that made the gradient.
        params = self._whole_params()
        maxima = self._exact.leaf_maxima(params, self._base, batch, record.step)
        return suspects_of(maxima, batch.ids)


def _leaf_ranges(world: LogicalWorld, ranges: Sequence[Range]) -> list[Range]:
    size = world.leaves_per_shard
    return [Range(part.first * size, part.end * size) for part in ranges]


def _placed(params: Tree, dtype: FloatDtype, device: jax.Device) -> Tree:
    placed: Tree = jax.device_put(
        jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params), device
    )
    return placed
