"""prefetch: the rows of step after step, read ahead by Grain's threads.

The order is our own arithmetic (sampler and step number); Grain gives the pool of readers
and hands results out in order. Nothing is kept between runs: a stream that starts at a step
yields what any other stream yields from that step on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from jaxserve.trainer.data.rows import Rows
from jaxserve.trainer.data.sampler import IndexSampler

Int64Array = npt.NDArray[np.int64]


class ExampleReader(Protocol):
    """What is read from: a TokenDataset, or something around one."""

    def read(self, ids: Int64Array) -> Rows:
        """The rows of `ids` (int64 [n]), in their order. Called from several threads."""


@dataclass(frozen=True, slots=True)
class StepRows:
    """One step's examples of this process.

    Attributes:
        step: from 0.
        ids: example ids, int64 [n], in the order of the batch.
        rows: their rows, in the same order.
    """

    step: int
    ids: Int64Array
    rows: Rows


def prefetch(
    sampler: IndexSampler,
    dataset: ExampleReader,
    *,
    first_step: int,
    stop_step: int,
    global_batch_size: int,
    ranges: Sequence[tuple[int, int]],
    num_threads: int = 2,
    max_buffered_steps: int = 4,
) -> Iterator[StepRows]:
    """Yields `first_step` .. `stop_step - 1`, in order.

    Args:
        sampler: says which ids a step has: indices step * B .. step * B + B - 1.
        dataset: what is read from.
        global_batch_size: B, examples of a step over all processes.
        ranges: half-open ranges of places in the batch, 0 .. B, that this process takes.
            Logical shard g of b examples is (g * b, g * b + b).
        num_threads: steps read at the same time.
        max_buffered_steps: steps read ahead, which bounds the memory.

    An error while reading is raised when its step is due. Raises ValueError for ranges
    outside the batch or steps below 0.
    """
    if not all(0 <= start <= stop <= global_batch_size for start, stop in ranges):
        raise ValueError(f"ranges must lie in 0 .. {global_batch_size}: {list(ranges)}")
    if not 0 <= first_step <= stop_step:
        raise ValueError(f"steps must ascend from 0 on: {first_step}, {stop_step}")
    import grain  # takes a while to import, and only trainers need it

    source = _StepSource(sampler, dataset, first_step, stop_step, global_batch_size, ranges)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=max_buffered_steps)
    steps: Iterator[StepRows] = iter(grain.MapDataset.source(source).to_iter_dataset(options))
    return steps


class _StepSource:
    """Steps as the random-access source that Grain expects."""

    def __init__(
        self,
        sampler: IndexSampler,
        dataset: ExampleReader,
        first_step: int,
        stop_step: int,
        global_batch_size: int,
        ranges: Sequence[tuple[int, int]],
    ) -> None:
        self._sampler = sampler
        self._dataset = dataset
        self._first_step = first_step
        self._num_steps = stop_step - first_step
        self._global_batch_size = global_batch_size
        self._ranges = tuple(ranges)

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, index: int) -> StepRows:
        step = self._first_step + index
        first_index = step * self._global_batch_size
        parts = [
            self._sampler.ids_of(first_index + start, stop - start) for start, stop in self._ranges
        ]
        ids = np.concatenate([np.empty(0, np.int64), *parts])
        return StepRows(step, ids, self._dataset.read(ids))
