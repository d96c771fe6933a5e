"""Which points make up each batch, and which labels join them.

A sampler has no state of its own: `order` and `extra_labels` are functions of a state of plain
arrays, and `refreshed` makes the next one from embeddings. The state is part of every snapshot and
checkpoint, so a run that goes on elsewhere makes the same batches. A refresh happens where an
epoch's first example is drawn, and the very batch that it falls into uses it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.trainer.data.mixing import GOLDEN_64, mix64, mix64_int
from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.xc.clusters import balanced_clusters, cluster_sizes, num_levels
from jaxserve.xc.label_sets import Int32Array, Int64Array, LabelSets
from jaxserve.xc.retrieval import retrieve
from jaxserve.xc.sampler_config import CLUSTERED, MINING, SamplerConfig

State: TypeAlias = Mapping[str, npt.NDArray[Any]]

GROUPED = "grouped"
LEVELS = "levels"
MINED = "mined"
BANK = "bank"
NOT_CLUSTERED = -1
NO_LABEL = -1

_POSITIVE_STREAM = 0x90517117E1ABE150
_HARD_STREAM = 0x4A2D5E6A71BE0B17


class Embeddings(Protocol):
    """What a refresh may ask for; computed when asked."""

    def points(self) -> jax.Array:
        """Of all training points, float32[N, D], each of length one."""
        ...

    def labels(self) -> jax.Array:
        """Of all labels, float32[num_labels, D], each of length one."""
        ...


@dataclass(frozen=True)
class Draw:
    """The examples of a step.

    Attributes:
        ids: points, int64[B].
        positives: for each one of its labels, int32[B].
        extra: labels that join as negatives, int32[M]; `NO_LABEL` where there is none.
    """

    ids: Int64Array
    positives: Int32Array
    extra: Int32Array


class Sampler:
    """See above.

    Args:
        config: the rule.
        labels: of the training points; each has at least one.
        seed: of every choice.
        batch_size: B.
        width: D, for the memory bank.

    Raises:
        ValueError: a point without labels.
    """

    def __init__(
        self, config: SamplerConfig, labels: LabelSets, *, seed: int, batch_size: int, width: int
    ) -> None:
        if labels.num_points == 0 or not labels.sizes().all():
            raise ValueError("every training point needs a label")
        self.config = config
        self.labels = labels
        self.num_points = labels.num_points
        self.num_extra = config.num_extra_labels(batch_size)
        self._seed = seed
        self._batch_size = batch_size
        self._width = width
        self._points = IndexSampler(self.num_points, seed)
        self._clusters_of: tuple[bytes, Int64Array] | None = None

    def initial_state(self) -> dict[str, npt.NDArray[Any]]:
        """The state before the first step; its arrays keep shapes and dtypes for ever."""
        config, state = self.config, dict[str, npt.NDArray[Any]]()
        if config.name in CLUSTERED:
            state[GROUPED] = np.arange(self.num_points, dtype=np.int32)
            state[LEVELS] = np.array(NOT_CLUSTERED, np.int32)
        if config.name in MINING:
            state[MINED] = np.full((self._mined_rows, config.pool), NO_LABEL, np.int32)
        if config.memory_bank:
            state[BANK] = np.zeros((self.num_points, self._width), np.float32)
        return state

    def refreshed(self, state: State, epoch: int, embeddings: Embeddings) -> State:
        """The state that the batches of `epoch` are drawn from; `state` itself if none is due."""
        config = self.config
        if not config.refreshes_at(epoch):
            return state
        if config.name == "ance":
            return {**state, MINED: self._hard_labels(embeddings)}
        points = jnp.asarray(state[BANK]) if config.memory_bank else embeddings.points()
        size = config.cluster_size_at(epoch)
        new = dict(state)
        if size == 1:
            new[LEVELS] = np.array(NOT_CLUSTERED, np.int32)
        else:
            levels = num_levels(self.num_points, size)
            seed = mix64_int(self._seed + GOLDEN_64 * (epoch + 1)) >> 33
            new[GROUPED] = balanced_clusters(points, levels, seed)
            new[LEVELS] = np.array(levels, np.int32)
        if config.name == "ngame_centroid":
            new[MINED] = self._labels_of_centres(new, points, embeddings)
        return new

    def order(self, state: State, epoch: int) -> Int64Array:
        """The points in the order in which `epoch` takes them: a permutation, int64[N]."""
        levels = int(state[LEVELS]) if LEVELS in state else NOT_CLUSTERED
        if levels == NOT_CLUSTERED:
            return self._points.ids_of(epoch * self.num_points, self.num_points)
        sizes = cluster_sizes(self.num_points, levels)
        shuffled = IndexSampler(len(sizes), self._seed).ids_of(epoch * len(sizes), len(sizes))
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])[shuffled]
        taken = sizes[shuffled]
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(taken)])[:-1]
        places = np.repeat(starts - before, taken) + np.arange(self.num_points)
        return state[GROUPED][places].astype(np.int64)

    def draw(self, state: State, ids: Int64Array, first_index: int) -> Draw:
        """Labels for a batch.

        Args:
            state: the newest.
            ids: the batch's points, int64[B].
            first_index: number of the first of them among all examples of the run.
        """
        indices = np.arange(first_index, first_index + len(ids), dtype=np.uint64)
        sizes = self.labels.sizes()[ids].astype(np.uint64)
        chosen = (self._hashed(_POSITIVE_STREAM, indices) % sizes).astype(np.int64)
        positives = self.labels.label_ids[self.labels.starts[ids] + chosen]
        extra = np.empty(0, np.int32)
        if self.config.name == "ance":
            places = self._hashed(_HARD_STREAM, indices) % np.uint64(self.config.pool)
            extra = np.asarray(state[MINED][ids, places.astype(np.int64)], np.int32)
        elif self.config.name == "ngame_centroid":
            extra = self._centre_labels(state, ids)
        return Draw(ids, positives, extra)

    def with_embeddings(
        self, state: State, ids: Int64Array, embeddings: npt.NDArray[np.float32]
    ) -> State:
        """The state after a step that gave `ids` these embeddings, float32[B, D]."""
        if BANK not in state:
            return state
        bank = state[BANK].copy()
        bank[ids] = embeddings
        return {**state, BANK: bank}

    def _hashed(self, stream: int, indices: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        return mix64(indices ^ np.uint64(mix64_int(self._seed ^ stream)))

    @property
    def _mined_rows(self) -> int:
        if self.config.name == "ance":
            return self.num_points
        smallest = self.config.cluster_size_at(self.config.first_refresh)
        return int(1 << num_levels(self.num_points, smallest))

    def _hard_labels(self, embeddings: Embeddings) -> Int32Array:
        """The `pool` best labels of each point that are not its own, int32[N, pool]."""
        pool, most = self.config.pool, int(self.labels.sizes().max())
        labels = embeddings.labels()
        _, found = retrieve(embeddings.points(), labels, min(pool + most, labels.shape[0]))
        is_own = self.labels.hits(found)
        order = np.argsort(is_own, axis=1, kind="stable")[:, :pool]
        mined = np.where(
            np.take_along_axis(is_own, order, axis=1),
            NO_LABEL,
            np.take_along_axis(found, order, axis=1),
        )
        return np.pad(mined, ((0, 0), (0, pool - mined.shape[1])), constant_values=NO_LABEL)

    def _labels_of_centres(
        self, state: State, points: jax.Array, embeddings: Embeddings
    ) -> Int32Array:
        """The `pool` labels that score highest for each cluster's centre, int32[rows, pool]."""
        # Clusters are never empty, and a state's points lie cluster after cluster.
        sizes = cluster_sizes(self.num_points, int(state[LEVELS]))
        starts = np.cumsum(sizes) - sizes
        centres = np.add.reduceat(np.asarray(points)[state[GROUPED]], starts, axis=0)
        centres /= np.maximum(np.linalg.norm(centres, axis=1, keepdims=True), 1e-12)
        labels = embeddings.labels()
        mined = np.full((self._mined_rows, self.config.pool), NO_LABEL, np.int32)
        _, found = retrieve(centres, labels, min(self.config.pool, labels.shape[0]))
        mined[: len(centres), : found.shape[1]] = found
        return mined

    def _centre_labels(self, state: State, ids: Int64Array) -> Int32Array:
        """Mined labels of the batch's clusters, the best of each first, each label once."""
        clusters = self._cluster_of_point(state)[ids]
        first_seen = np.sort(np.unique(clusters, return_index=True)[1])
        by_rank = state[MINED][clusters[first_seen]].T.reshape(-1)
        by_rank = by_rank[by_rank != NO_LABEL]
        places = np.sort(np.unique(by_rank, return_index=True)[1])
        extra = np.full(self.num_extra, NO_LABEL, np.int32)
        chosen = by_rank[places][: self.num_extra]
        extra[: len(chosen)] = chosen
        return extra

    def _cluster_of_point(self, state: State) -> Int64Array:
        """Cluster of each point, int64[N]; without clusters every point is one of its own."""
        levels = int(state[LEVELS])
        if levels == NOT_CLUSTERED:
            return np.arange(self.num_points) % self._mined_rows
        key = state[GROUPED].tobytes()
        if self._clusters_of is None or self._clusters_of[0] != key:
            sizes = cluster_sizes(self.num_points, levels)
            of_point = np.empty(self.num_points, np.int64)
            of_point[state[GROUPED]] = np.repeat(np.arange(len(sizes)), sizes)
            self._clusters_of = (key, of_point)
        return self._clusters_of[1]


@dataclass(frozen=True)
class Segment:
    """A part of a batch within one epoch: `count` examples from the epoch's `offset`-th on."""

    epoch: int
    offset: int
    count: int


def segments(first_index: int, count: int, num_points: int) -> list[Segment]:
    """The parts of the examples `first_index .. first_index + count - 1` of a run."""
    parts = []
    index, end = first_index, first_index + count
    while index < end:
        epoch, offset = divmod(index, num_points)
        size = min(end - index, num_points - offset)
        parts.append(Segment(epoch, offset, size))
        index += size
    return parts


class BatchOrder:
    """The points of each step, with refreshes where an epoch begins. Keeps the newest state.

    Args:
        sampler: the rule.
        batch_size: B.
        state: of the sampler, that of the next step.

    Attributes:
        num_refreshes, mining_s: how often clusters or labels were made anew, and how long it took.
    """

    def __init__(self, sampler: Sampler, batch_size: int, state: State) -> None:
        self.sampler = sampler
        self.state = state
        self.num_refreshes = 0
        self.mining_s = 0.0
        self._batch_size = batch_size
        self._order: tuple[int, Int64Array] | None = None

    def next_draw(self, step: int, embeddings: Embeddings) -> Draw:
        """The examples of `step`, which must be the next one of the state."""
        first_index = step * self._batch_size
        parts = []
        for one in segments(first_index, self._batch_size, self.sampler.num_points):
            if one.offset == 0:
                begin_s = time.perf_counter()
                new = self.sampler.refreshed(self.state, one.epoch, embeddings)
                self.mining_s += time.perf_counter() - begin_s
                self.num_refreshes += new is not self.state
                self.state, self._order = new, None
            parts.append(self._order_of(one.epoch)[one.offset : one.offset + one.count])
        return self.sampler.draw(self.state, np.concatenate(parts), first_index)

    def remember(self, ids: Int64Array, embeddings: npt.NDArray[np.float32]) -> None:
        """Takes in the embeddings that a step gave its points."""
        self.state = self.sampler.with_embeddings(self.state, ids, embeddings)

    def _order_of(self, epoch: int) -> Int64Array:
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, self.sampler.order(self.state, epoch))
        return self._order[1]
