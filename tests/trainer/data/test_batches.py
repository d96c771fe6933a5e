"""BatchReader: the same rows in the same order, from any example on, read ahead by Grain."""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt
import pytest

from jaxserve.errors import ConfigError
from jaxserve.trainer.batches import NUM_BATCHES_AHEAD, BatchReader
from jaxserve.trainer.data.dataset import TokenDataset
from jaxserve.trainer.data.errors import DataError
from jaxserve.trainer.data.rows import Rows
from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.trainer.shard_gradient import pack_rows
from jaxserve.trainer.world import LogicalWorld
from tests.trainer.tiny_dataset import make_dataset

BATCH = 16


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    return TokenDataset(make_dataset(tmp_path_factory.mktemp("batches")))


class Logged:
    """Notes which ids are read, by which thread."""

    def __init__(self, dataset: TokenDataset) -> None:
        self.dataset = dataset
        self.num_examples = dataset.num_examples
        self.seq_len = dataset.seq_len
        self.reads: list[tuple[str, list[int]]] = []

    def target_counts(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        return self.dataset.target_counts(ids)

    def read(self, ids: npt.NDArray[np.int64]) -> Rows:
        self.reads.append((threading.current_thread().name, ids.tolist()))
        return self.dataset.read(ids)


def reader(dataset: TokenDataset | Logged, leaves: list[int], num_examples: int = 0) -> BatchReader:
    world = LogicalWorld(
        global_batch_size=BATCH, num_logical_shards=8, micro_batch_size=2, seq_len=dataset.seq_len
    )
    sampler = IndexSampler(num_examples or dataset.num_examples, seed=5)
    return BatchReader(world, dataset, sampler, leaves)


def test_a_stream_can_begin_at_any_step(dataset: TokenDataset) -> None:
    sampler = IndexSampler(dataset.num_examples, seed=5)
    num_steps = 2 * dataset.num_examples // BATCH + 2  # Epochs end inside a step.
    whole, later = reader(dataset, list(range(8))), reader(dataset, [3])
    for step in range(num_steps):
        batch = whole.read(step * BATCH)
        ids = sampler.ids_of(step * BATCH, BATCH)
        assert np.array_equal(batch.ids, ids)
        assert batch.num_tokens == dataset.target_counts(ids).sum()
        for leaf, packed in batch.packed.items():
            own = ids[2 * leaf : 2 * leaf + 2]
            assert np.array_equal(packed, pack_rows(dataset.read(own), own))
        if step >= 5:
            assert np.array_equal(later.read(step * BATCH).packed[3], batch.packed[3])
        if step == 9:  # Going back is allowed, and costs what was read ahead.
            assert np.array_equal(later.read(0).ids, sampler.ids_of(0, BATCH))
    whole.close()
    later.close()


def test_processes_share_a_step_without_gap_or_overlap(dataset: TokenDataset) -> None:
    logs = [Logged(dataset) for _ in range(3)]
    readers = [
        reader(log, leaves)
        for log, leaves in zip(logs, ([0, 1, 2], [3], [4, 5, 6, 7]), strict=True)
    ]
    ids = [one.read(7 * BATCH).ids for one in readers]
    for one in readers:
        one.close()
    read = [example for log, n in zip(logs, (3, 1, 4), strict=True)
            for _, own in log.reads[:n] for example in own]  # fmt: skip
    assert read == ids[0].tolist()
    assert all(np.array_equal(ids[0], other) for other in ids)


def test_it_reads_ahead_in_a_thread_but_not_without_bound(dataset: TokenDataset) -> None:
    log = Logged(dataset)
    ahead = reader(log, [0])
    ahead.read(0)
    deadline_s = time.monotonic() + 10
    while len(log.reads) < 1 + NUM_BATCHES_AHEAD:
        assert time.monotonic() < deadline_s
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(log.reads) <= 2 + NUM_BATCHES_AHEAD
    assert {name for name, _ in log.reads} != {threading.current_thread().name}
    num_threads = threading.active_count()
    ahead.close()
    assert threading.active_count() <= num_threads


def test_one_batch_alone_is_read_at_once(dataset: TokenDataset) -> None:
    log = Logged(dataset)
    reader(log, [0, 1]).read_once(3 * BATCH)
    assert [name for name, _ in log.reads] == [threading.current_thread().name] * 2


def test_an_error_while_reading_is_raised_when_its_batch_is_due(dataset: TokenDataset) -> None:
    broken = reader(dataset, [0], num_examples=dataset.num_examples + 10)  # Ids beyond the data.
    sampler = IndexSampler(dataset.num_examples + 10, seed=5)
    step = 0
    while sampler.ids_of(step * BATCH, BATCH).max() < dataset.num_examples:
        broken.read(step * BATCH)
        step += 1
    assert step < 8
    with pytest.raises(DataError, match="example ids must be from 0"):
        broken.read(step * BATCH)


def test_rows_of_another_length_are_refused(dataset: TokenDataset) -> None:
    world = LogicalWorld(
        global_batch_size=BATCH, num_logical_shards=8, micro_batch_size=2, seq_len=7
    )
    with pytest.raises(ConfigError, match="seq_len is 7, but the data set was prepared"):
        BatchReader(world, dataset, IndexSampler(dataset.num_examples, seed=5), [0])
