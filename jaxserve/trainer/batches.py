"""A step's examples as a process needs them, read one step ahead."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jaxserve.errors import ConfigError
from jaxserve.trainer.data.rows import Rows
from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.trainer.shard_gradient import pack_rows
from jaxserve.trainer.world import LogicalWorld

Int64Array = npt.NDArray[np.int64]


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
    """Reads batches by the number of their first example; the next one while a step runs.

    Args:
        world: sizes.
        dataset: what is read.
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
        self._leaves = tuple(leaves)
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batch-reader")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def read(self, first_index: int, next_index: int | None = None) -> Batch:
        """The batch from example `first_index` on.

        Args:
            first_index: number of its first example among all of the run.
            next_index: that of the batch to begin reading now, for the next call.
        """
        started = time.monotonic()
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead[0] == first_index:
            batch = ahead[1].result()
        else:
            batch = self._read(first_index)
        if next_index is not None:
            self._ahead = (next_index, self._reader.submit(self._read, next_index))
        return Batch(batch.ids, batch.num_tokens, batch.packed, time.monotonic() - started)

    def read_leaf(self, batch: Batch, leaf: int) -> npt.NDArray[np.int32]:
        """Rows of any leaf of a batch, also of another process's."""
        if leaf in batch.packed:
            return batch.packed[leaf]
        return self._leaf(batch.ids, leaf)

    def close(self) -> None:
        """Ends the reading thread."""
        self._reader.shutdown(wait=True, cancel_futures=True)

    def _read(self, first_index: int) -> Batch:
        ids = self._sampler.ids_of(first_index, self._world.global_batch_size)
        num_tokens = int(self._dataset.target_counts(ids).sum(dtype=np.int64))
        packed = {leaf: self._leaf(ids, leaf) for leaf in self._leaves}
        return Batch(ids, num_tokens, packed, 0.0)

    def _leaf(self, ids: Int64Array, leaf: int) -> npt.NDArray[np.int32]:
        size = self._world.micro_batch_size
        own = ids[leaf * size : (leaf + 1) * size]
        return pack_rows(self._dataset.read(own), own)
