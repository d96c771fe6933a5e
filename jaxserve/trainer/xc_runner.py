"""XcRunner: what a trainer drives when the task is extreme classification."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxserve.trainer.config import TrainConfig
from jaxserve.trainer.exchange import Exchange
from jaxserve.trainer.incidents import dropped
from jaxserve.trainer.shard_gradient import Tree, flat_vector_of
from jaxserve.trainer.state_layout import Buffer, StateLayout
from jaxserve.trainer.step_config import StepConfig
from jaxserve.trainer.step_record import EvalRecord, StepRecord
from jaxserve.trainer.update_state import UpdateState
from jaxserve.trainer.world import LogicalWorld, Range
from jaxserve.trainer.xc_tasks import ClassifierTask, EncoderTask, XcTask
from jaxserve.xc.dataset import XcDataset
from jaxserve.xc.encoders import EncoderSpec, abstract_params, initial_params, spec_of
from jaxserve.xc.model_folder import CLASSIFIERS, digest_of, open_xc_model
from jaxserve.xc.retrieval import retrieve

FROZEN_ENCODER = "frozen_encoder"
"""Name of the digest of the parameters that classifiers are trained on."""
VALIDATION = "validation"


class XcRunner:
    """See `jaxserve.trainer.step_record.Runner`, which this is.

    Args:
        world: the logical world.
        config: how a step updates.
        task: what a step computes.
        state: of the run.
        exchange: devices and their leaves.
        ranges: logical shards of each device.
        dataset: for evaluations.
        max_eval_examples: at most so many validation points; None: all.
    """

    def __init__(
        self,
        *,
        world: LogicalWorld,
        config: StepConfig,
        task: XcTask,
        state: UpdateState,
        exchange: Exchange,
        ranges: tuple[Range, ...],
        dataset: XcDataset,
        max_eval_examples: int | None = None,
    ) -> None:
        self.num_devices = exchange.num_devices
        self.ranges = ranges
        self.on_exchange: Callable[[], None] | None = None
        self.task = task
        self._world = world
        self._config = config
        self._state = state
        self._dataset = dataset
        self._max_eval_examples = max_eval_examples
        self._is_loaded = False

    @property
    def layout(self) -> StateLayout:
        """Segments of a state's buffer."""
        return self._state.layout

    def params(self) -> list[Tree]:
        """The parameters of each local device."""
        return self._state.params()

    def load_state(self, buffer: Buffer | None) -> int:
        """Takes over a state and returns the next step; None: a fresh one at step 0."""
        if buffer is None:
            buffer = self._state.initial_buffer(self.task.initial_params())
        self._is_loaded = True
        return self._state.load(buffer)

    def store_state(self, buffer: Buffer) -> None:
        """Writes this process's part of the state."""
        self._state.store(buffer)

    def state_ranges(self) -> tuple[tuple[int, int], ...]:
        """The (offset, size) in bytes of what `store_state` writes."""
        return self._state.ranges()

    def run_step(self, step: int) -> StepRecord:
        """Computes one step.

        Raises:
            ValueError: it is not the state's next one.
            EncoderCollapsed: nothing is learnt any more.
        """
        state = self._state
        if not self._is_loaded or step != state.next_step:
            raise ValueError(f"step {step}, but the state is at step {state.next_step}")
        done = self.task.step(state.params(), state.task_arrays, step, self.on_exchange)
        state.drop_params()
        size = self._world.global_batch_size
        decision = state.update(done.gradients, step, size)
        spread = None if done.spread is None else float(done.spread)
        state.task_arrays = self.task.settled(done.arrays, float(decision.loss), spread)
        first = self._world.first_index(step)
        record = StepRecord(
            step=step,
            loss=np.float32(decision.loss),
            grad_norm=np.float32(decision.grad_norm),
            lr=np.float32(decision.lr),
            first_index=first,
            last_index=first + size - 1,
            ids_sha256=hashlib.sha256(done.ids.astype("<i8").tobytes()).hexdigest(),
            num_tokens=size,
            data_wait_s=done.mining_s,
            params_digest=state.digest(step),
        )
        if decision.applied:
            return record
        return dropped(self._config.incidents, record, tuple(sorted(set(done.ids.tolist()))))

    def evaluate(self) -> EvalRecord:
        """1 - P@1 over the validation points, as the loss. Changes nothing."""
        points, labels = self.task.embeddings(self._state.params(), VALIDATION)
        truth = self._dataset.split(VALIDATION).labels
        num_points = min(len(points), self._max_eval_examples or len(points))
        truth = truth.take(np.arange(num_points))
        _, found = retrieve(np.asarray(points)[:num_points], labels, 1)
        wrong = 1.0 - float(truth.hits(found).mean())
        return EvalRecord(loss=np.float32(wrong), num_tokens=num_points, num_examples=num_points)

    def close(self) -> None:
        """Nothing reads ahead."""


def make_xc_runner(
    config: TrainConfig,
    world: LogicalWorld,
    devices: Sequence[jax.Device],
    weights: Sequence[float] | None = None,
) -> tuple[XcRunner, dict[str, str]]:
    """A trainer's runner, and the digests of what its bits depend on beside the data.

    Raises:
        ConfigError, XcDataError, FormatError: config, data or encoder do not fit together.
    """
    assert config.xc is not None
    dataset = XcDataset(config.data.path)
    spec, encoder_params, digests = _encoder_of(config, dataset)
    runner = build_runner(config, world, devices, weights, dataset, spec, encoder_params)
    return runner, digests


def build_runner(
    config: TrainConfig,
    world: LogicalWorld,
    devices: Sequence[jax.Device],
    weights: Sequence[float] | None,
    dataset: XcDataset,
    spec: EncoderSpec,
    encoder_params: Tree | None,
) -> XcRunner:
    """A runner of stage "encoder", or, with an encoder's parameters, of stage "classifiers".

    Args:
        config: of the run.
        world: the logical world.
        devices: all devices of all processes in order.
        weights: relative speeds of the devices; None: equal.
        dataset: what is trained on.
        spec: the encoder's shape.
        encoder_params: of a frozen encoder.
    """
    assert config.xc is not None
    abstract: Tree = abstract_params(spec)
    if encoder_params is not None:
        shape = (dataset.num_labels, spec.width)
        abstract = {CLASSIFIERS: jax.ShapeDtypeStruct(shape, np.float32)}
    step_config = config.step_config()
    flat = flat_vector_of(abstract, step_config.optimizer.decayed)
    ranges = world.ranges_of(len(devices), weights)
    size = world.leaves_per_shard
    leaf_ranges = [Range(one.first * size, one.end * size) for one in ranges]
    exchange = Exchange(devices, leaf_ranges, flat, world.num_leaves)
    task: XcTask
    if encoder_params is None:
        encoder = config.xc.encoder

        def fresh() -> Tree:
            return initial_params(encoder, spec, world.rng_seed)

        task = EncoderTask(world, config.xc, dataset, spec, flat, exchange, fresh)
    else:
        task = ClassifierTask(world, config.xc, dataset, spec, flat, exchange, encoder_params)
    rate = config.parsed_schedule
    state = UpdateState(flat, exchange, step_config, rate, task.initial_arrays())
    evaluation = config.evaluation
    return XcRunner(
        world=world,
        config=step_config,
        task=task,
        state=state,
        exchange=exchange,
        ranges=ranges,
        dataset=dataset,
        max_eval_examples=None if evaluation is None else evaluation.max_examples,
    )


def _encoder_of(
    config: TrainConfig, dataset: XcDataset
) -> tuple[EncoderSpec, Tree | None, dict[str, str]]:
    """The encoder's spec; and for classifiers its parameters, with their digest."""
    assert config.xc is not None
    if config.xc.encoder_run is None:
        return spec_of(config.xc.encoder, dataset), None, {}
    model = open_xc_model(Path(config.xc.encoder_run))
    params = model.read_encoder()
    return model.encoder, params, {FROZEN_ENCODER: digest_of(params)}
