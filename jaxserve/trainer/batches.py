"""A step's examples as a process needs them, read ahead by Grain.

The order is our own arithmetic (sampler and number of the example); Grain gives the threads and
hands batches out in order. Nothing is kept between runs: a stream that starts at an example yields
what any other stream yields from there on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import grain
import numpy as np
import numpy.typing as npt

from jaxserve.errors import ConfigError
from jaxserve.trainer.data.rows import Rows
from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.trainer.shard_gradient import pack_rows
from jaxserve.trainer.world import LogicalWorld

Int64Array = npt.NDArray[np.int64]
NUM_BATCHES_AHEAD = 2
_ENDLESS = 1 << 40


class Dataset(Protocol):
    """What a step reads from; `jaxserve.trainer.data.dataset.TokenDataset` is one."""

    @property
    def num_examples(self) -> int:
        """Ids are 0 .. num_examples - 1."""
        ...

    @property
    def seq_len(self) -> int:
        """Positions of a row."""
        ...

    def target_counts(self, ids: Int64Array) -> npt.NDArray[np.int32]:
        """Targets that count, for each id, without reading rows."""
        ...

    def read(self, ids: Int64Array) -> Rows:
        """The rows of `ids`, in their order."""
        ...


@dataclass(frozen=True)
class Batch:
    """A global batch, of which only this process's rows were read.

    Attributes:
        ids: of all examples, int64[B].
        num_tokens: targets that count, in the whole batch.
        packed: leaf -> its rows, see `pack_rows`.
        wait_s: how long the caller waited for it.
    """

    ids: Int64Array
    num_tokens: int
    packed: dict[int, npt.NDArray[np.int32]]
    wait_s: float

    def ids_sha256(self) -> str:
        """sha256 in hex of the ids as little-endian int64."""
        return hashlib.sha256(self.ids.astype("<i8").tobytes()).hexdigest()


class BatchReader:
    """Reads batches by the number of their first example; the next ones while a step runs.

    Args:
        world: sizes.
        dataset: what is read; from a thread of the reader's, too.
        sampler: order of the examples.
        leaves: micro-batches of a batch that this process computes.

    Raises:
        ConfigError: the data set's rows have another length than the world's.
    """

    def __init__(
        self,
        world: LogicalWorld,
        dataset: Dataset,
        sampler: IndexSampler,
        leaves: Sequence[int],
    ) -> None:
        if dataset.seq_len != world.seq_len:
            raise ConfigError(
                f"seq_len is {world.seq_len}, but the data set was prepared with rows of "
                f"{dataset.seq_len}; give that, or prepare the data anew with --seq-len"
            )
        self._world = world
        self._dataset = dataset
        self._sampler = sampler
        self.leaves = tuple(leaves)
        self._stream: Any = None
        self._next_index = -1

    @property
    def batch_size(self) -> int:
        """Examples of a batch, over all processes."""
        return self._world.global_batch_size

    def read(self, first_index: int) -> Batch:
        """The batch from example `first_index` (among all of the run) on; the following ones are
        read meanwhile.

        An error while reading ahead is raised when its batch is due.
        """
        started = time.monotonic()
        if self._stream is None or first_index != self._next_index:
            self.close()
            options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=NUM_BATCHES_AHEAD)
            batches = grain.MapDataset.source(_BatchSource(self, first_index))
            self._stream = iter(batches.to_iter_dataset(options))
        batch: Batch = next(self._stream)
        self._next_index = first_index + self.batch_size
        return replace(batch, wait_s=time.monotonic() - started)

    def read_once(self, first_index: int) -> Batch:
        """The same without reading ahead."""
        ids = self._sampler.ids_of(first_index, self.batch_size)
        num_tokens = int(self._dataset.target_counts(ids).sum(dtype=np.int64))
        return Batch(ids, num_tokens, {leaf: self._leaf(ids, leaf) for leaf in self.leaves}, 0.0)

    def read_leaf(self, batch: Batch, leaf: int) -> npt.NDArray[np.int32]:
        """Rows of any leaf of a batch, also of another process's."""
        if leaf in batch.packed:
            return batch.packed[leaf]
        return self._leaf(batch.ids, leaf)

    def close(self) -> None:
        """Ends the reading thread."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def _leaf(self, ids: Int64Array, leaf: int) -> npt.NDArray[np.int32]:
        size = self._world.micro_batch_size
        own = ids[leaf * size : (leaf + 1) * size]
        return pack_rows(self._dataset.read(own), own)


class _BatchSource:
    """Batches from an example on, as the random-access source that Grain expects."""

    def __init__(self, reader: BatchReader, first_index: int) -> None:
        self._reader = reader
        self._first_index = first_index

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, number: int) -> Batch:
        size = self._reader.batch_size
        return self._reader.read_once(self._first_index + number * size)
