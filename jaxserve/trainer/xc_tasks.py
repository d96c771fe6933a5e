"""The two stages of extreme classification, as what computes a step's gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.errors import ConfigError
from jaxserve.trainer.exact_gradient import Gradients
from jaxserve.trainer.exchange import Exchange, add
from jaxserve.trainer.flat_vector import FlatVector
from jaxserve.trainer.gradient_tree import Node, TreeSum
from jaxserve.trainer.shard_gradient import Tree
from jaxserve.trainer.world import LogicalWorld
from jaxserve.trainer.xc_gradient import (
    ContrastGradient,
    ContrastSpec,
    embed_all,
    flatten_alone,
)
from jaxserve.xc.collapse import collapsed_steps
from jaxserve.xc.config import LossConfig, XcSection
from jaxserve.xc.dataset import XcDataset
from jaxserve.xc.encoders import EncoderSpec
from jaxserve.xc.label_sets import Int64Array, is_repeat
from jaxserve.xc.losses import classifier_losses
from jaxserve.xc.model_folder import CLASSIFIERS
from jaxserve.xc.samplers import BatchOrder, Draw, Sampler

Arrays: TypeAlias = Mapping[str, npt.NDArray[Any]]
OnExchange: TypeAlias = Callable[[], None] | None

SAMPLER = "sampler/"
COLLAPSED = "collapse/num_steps"


@dataclass(frozen=True)
class TaskStep:
    """What a task makes of a step.

    Attributes:
        gradients: chunks and losses; see `Exchange.reduce`.
        ids: the points of the batch, int64[B].
        arrays: what the task keeps, for the next step.
        mining_s: seconds spent on clusters and mined labels.
        spread: of the points' embeddings; None where they do not change.
    """

    gradients: Gradients
    ids: Int64Array
    arrays: Arrays
    mining_s: float
    spread: jax.Array | None = None


class XcTask(Protocol):
    """A stage. All processes make the same calls in the same order."""

    flat: FlatVector

    def initial_params(self) -> Tree:
        """What a fresh run starts from."""
        ...

    def initial_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What the task keeps, at the beginning."""
        ...

    def step(
        self, params: Sequence[Tree], arrays: Arrays, step: int, on_exchange: OnExchange
    ) -> TaskStep:
        """The gradient of a step."""
        ...

    def settled(self, arrays: Arrays, loss: float, spread: float | None) -> Arrays:
        """`arrays` once the loss is known. Raises EncoderCollapsed."""
        ...

    def embeddings(self, params: Sequence[Tree], split: str) -> tuple[jax.Array, jax.Array]:
        """Of a split's points and of all labels, as they are scored by inner product."""
        ...


class _Current:
    """Embeddings by the parameters of now, computed once when asked for."""

    def __init__(self, points: Callable[[], jax.Array], labels: Callable[[], jax.Array]) -> None:
        self.points = points
        self.labels = labels


class EncoderTask:
    """Stage "encoder": points and labels through one encoder, negatives from the batch.

    Args:
        world: sizes and seeds.
        config: of the task.
        dataset: what is trained on.
        spec: the encoder's shape.
        flat: the vector of its parameters.
        exchange: devices and their leaves.
        initial_params: what a fresh run starts from.

    Raises:
        ConfigError: mined labels that the micro-batches cannot share equally.
    """

    def __init__(
        self,
        world: LogicalWorld,
        config: XcSection,
        dataset: XcDataset,
        spec: EncoderSpec,
        flat: FlatVector,
        exchange: Exchange,
        initial_params: Callable[[], Tree],
    ) -> None:
        self.flat = flat
        self.initial_params = initial_params
        self._world = world
        self._config = config
        self._dataset = dataset
        self._spec = spec
        self._exchange = exchange
        self._train = dataset.split("train")
        self._labels = dataset.labels()
        self._sampler = _sampler_of(world, config, dataset, spec.width)
        if self._sampler.num_extra % world.num_leaves:
            raise ConfigError(
                f"xc.sampler.num_mined is {self._sampler.num_extra}; it must be a multiple of the "
                f"{world.num_leaves} micro-batches of a batch, which share these labels"
            )
        contrast = ContrastSpec(spec, flat, config.loss, world.num_leaves, world.micro_batch_size)
        self._gradient = ContrastGradient(contrast, exchange)
        self._order: BatchOrder | None = None

    def initial_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """See `XcTask`."""
        sampler = {SAMPLER + name: one for name, one in self._sampler.initial_state().items()}
        return {**sampler, COLLAPSED: np.array(0, np.int32)}

    def step(
        self, params: Sequence[Tree], arrays: Arrays, step: int, on_exchange: OnExchange
    ) -> TaskStep:
        """See `XcTask`."""
        order = self._order = _order_of(self._sampler, self._world, arrays, self._order)
        current = _Current(
            lambda: embed_all(self._spec, self._exchange, params, self._train.texts),
            lambda: embed_all(self._spec, self._exchange, params, self._labels),
        )
        mined_before_s = order.mining_s
        draw = order.next_draw(step, current)
        mining_s = order.mining_s - mined_before_s
        labels = np.concatenate([draw.positives, draw.extra])
        # A batch's labels are a set: ten copies of one label would be all of a point's ten hardest.
        is_no_negative = (labels < 0) | is_repeat(labels)
        is_excluded = self._train.labels.contains(draw.ids, labels) | is_no_negative
        packed = {
            leaf: self._packed(draw, leaf)
            for place in self._exchange.local
            for leaf in range(
                self._exchange.leaf_ranges[place].first, self._exchange.leaf_ranges[place].end
            )
        }
        gradients, points, spread = self._gradient(params, packed, is_excluded, on_exchange)
        if self._config.sampler.memory_bank:
            order.remember(draw.ids, np.asarray(points))
        return TaskStep(gradients, draw.ids, _kept(arrays, order), mining_s, spread)

    def settled(self, arrays: Arrays, loss: float, spread: float | None) -> Arrays:
        """See `XcTask`."""
        assert spread is not None
        count = collapsed_steps(self._config, int(arrays[COLLAPSED]), loss, spread)
        return {**arrays, COLLAPSED: np.array(count, np.int32)}

    def embeddings(self, params: Sequence[Tree], split: str) -> tuple[jax.Array, jax.Array]:
        """See `XcTask`."""
        texts = self._dataset.split(split).texts
        return (
            embed_all(self._spec, self._exchange, params, texts),
            embed_all(self._spec, self._exchange, params, self._labels),
        )

    def _packed(self, draw: Draw, leaf: int) -> npt.NDArray[np.int32]:
        """A micro-batch's points, as many positives, and its part of the labels that join."""
        size = self._world.micro_batch_size
        own = slice(leaf * size, (leaf + 1) * size)
        num_extra = len(draw.extra) // self._world.num_leaves
        labels = np.concatenate(
            [draw.positives[own], draw.extra[leaf * num_extra : (leaf + 1) * num_extra]]
        )
        points = self._spec.pack(self._train.texts, draw.ids[own])
        return np.concatenate([points, self._spec.pack(self._labels, labels)])


class ClassifierTask:
    """Stage "classifiers": a vector a label against the embeddings of a frozen encoder.

    The columns of a step are the labels of its points, all of them, and those that the sampler
    adds: what is not a point's own is its negative.

    Args:
        world, config, dataset, spec, flat, exchange: as of `EncoderTask`.
        encoder_params: of the frozen encoder.
    """

    def __init__(
        self,
        world: LogicalWorld,
        config: XcSection,
        dataset: XcDataset,
        spec: EncoderSpec,
        flat: FlatVector,
        exchange: Exchange,
        encoder_params: Tree,
    ) -> None:
        self.flat = flat
        self._world = world
        self._config = config
        self._dataset = dataset
        self._spec = spec
        self._exchange = exchange
        self._train = dataset.split("train")
        self._sampler = _sampler_of(world, config, dataset, spec.width)
        self._order: BatchOrder | None = None
        self._encoders = [
            jax.device_put(encoder_params, exchange.devices[place]) for place in exchange.local
        ]
        self._points = np.asarray(embed_all(spec, exchange, self._encoders, self._train.texts))
        most = np.sort(self._train.labels.sizes())[::-1][: world.global_batch_size].sum()
        self._num_columns = min(int(most), dataset.num_labels) + self._sampler.num_extra

    def initial_params(self) -> Tree:
        """The labels' embeddings."""
        labels = embed_all(self._spec, self._exchange, self._encoders, self._dataset.labels())
        return {CLASSIFIERS: labels}

    def initial_arrays(self) -> dict[str, npt.NDArray[Any]]:
        """See `XcTask`."""
        return {SAMPLER + name: one for name, one in self._sampler.initial_state().items()}

    def step(
        self, params: Sequence[Tree], arrays: Arrays, step: int, on_exchange: OnExchange
    ) -> TaskStep:
        """See `XcTask`."""
        order = self._order = _order_of(self._sampler, self._world, arrays, self._order)
        current = _Current(lambda: jnp.asarray(self._points), lambda: unit(params[0][CLASSIFIERS]))
        mined_before_s = order.mining_s
        draw = order.next_draw(step, current)
        mining_s = order.mining_s - mined_before_s
        if self._config.sampler.memory_bank:
            order.remember(draw.ids, self._points[draw.ids])
        columns = self._columns(draw)
        sums, losses = [], []
        for place, own in zip(self._exchange.local, params, strict=True):
            leaves = self._exchange.leaf_ranges[place]
            total, shares = TreeSum(add), []
            for leaf in range(leaves.first, leaves.end):
                vector, share = self._leaf(own, draw, columns, leaf, place)
                total.push(Node(0, leaf), vector)
                shares.append(share)
            sums.append(total)
            losses.append(shares)
        if on_exchange is not None:
            jax.block_until_ready([vector for one in sums for _, vector in one.parts])
            on_exchange()
        gradients = self._exchange.reduce(sums, losses)
        return TaskStep(gradients, draw.ids, _kept(arrays, order), mining_s)

    def settled(self, arrays: Arrays, loss: float, spread: float | None) -> Arrays:
        """See `XcTask`: classifiers do not collapse, since points stay where they are."""
        del loss, spread
        return arrays

    def embeddings(self, params: Sequence[Tree], split: str) -> tuple[jax.Array, jax.Array]:
        """See `XcTask`."""
        texts = self._dataset.split(split).texts
        points = embed_all(self._spec, self._exchange, self._encoders, texts)
        return points, unit(params[0][CLASSIFIERS])

    def _columns(self, draw: Draw) -> npt.NDArray[np.int32]:
        """Labels of the batch, ascending, each once, then -1: int32[num_columns]."""
        own = self._train.labels.take(draw.ids).label_ids
        found = np.unique(np.concatenate([own, draw.extra[draw.extra >= 0]]))
        columns = np.full(self._num_columns, -1, np.int32)
        columns[: len(found)] = found
        return columns

    def _leaf(
        self, params: Tree, draw: Draw, columns: npt.NDArray[np.int32], leaf: int, place: int
    ) -> tuple[jax.Array, jax.Array]:
        size = self._world.micro_batch_size
        ids = draw.ids[leaf * size : (leaf + 1) * size]
        inputs = (self._points[ids], columns, self._train.labels.contains(ids, columns))
        on_device = jax.device_put(inputs, self._exchange.devices[place])
        gradient, share = _classifier_gradient(
            self._config.loss, self._world.global_batch_size, params, *on_device
        )
        return flatten_alone(self.flat, gradient), share


def unit(vectors: jax.Array) -> jax.Array:
    """Rows scaled to length one."""
    norms = jnp.sqrt(jnp.square(vectors).sum(axis=-1, keepdims=True) + 1e-12)
    return vectors / norms


@partial(jax.jit, static_argnums=(0, 1))
def _classifier_gradient(
    loss: LossConfig,
    batch_size: int,
    params: Tree,
    points: jax.Array,
    columns: jax.Array,
    is_positive: jax.Array,
) -> tuple[Tree, jax.Array]:
    """A micro-batch's part of the gradient, and its share in the mean loss, float32[1]."""

    def share_of(tree: Tree) -> jax.Array:
        vectors = unit(tree[CLASSIFIERS][jnp.maximum(columns, 0)])
        is_negative = ~is_positive & (columns >= 0)
        losses = classifier_losses(loss, points @ vectors.T, is_positive, is_negative)
        return losses.sum() / batch_size

    share, gradient = jax.value_and_grad(share_of)(params)
    return gradient, share[None]


def _sampler_of(world: LogicalWorld, config: XcSection, dataset: XcDataset, width: int) -> Sampler:
    return Sampler(
        config.sampler,
        dataset.split("train").labels,
        seed=world.data_seed,
        batch_size=world.global_batch_size,
        width=width,
    )


def _order_of(
    sampler: Sampler, world: LogicalWorld, arrays: Arrays, order: BatchOrder | None
) -> BatchOrder:
    """The order that goes on from `arrays`: the one there is, unless a state was loaded."""
    if order is not None and all(
        arrays.get(SAMPLER + name) is one for name, one in order.state.items()
    ):
        return order
    state = {name.removeprefix(SAMPLER): one for name, one in arrays.items()
             if name.startswith(SAMPLER)}  # fmt: skip
    return BatchOrder(sampler, world.global_batch_size, state)


def _kept(arrays: Arrays, order: BatchOrder) -> Arrays:
    return {**arrays, **{SAMPLER + name: one for name, one in order.state.items()}}
