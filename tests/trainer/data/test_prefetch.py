"""prefetch: the same rows in the same order, from any step on, on any number of processes."""

from __future__ import annotations

import threading

import numpy as np
import numpy.typing as npt
import pytest

from jaxserve.trainer.data.dataset import TokenDataset
from jaxserve.trainer.data.errors import DataError
from jaxserve.trainer.data.prefetch import StepRows, prefetch
from jaxserve.trainer.data.rows import Rows
from jaxserve.trainer.data.sampler import IndexSampler
from tests.trainer.data.rig import texts, write_jsonl
from tests.trainer.data.test_prepare import run

BATCH = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("prefetch")
    source = write_jsonl(folder / "a.jsonl", [{"text": text} for text in texts(80)])
    return TokenDataset(run(folder / "out", source))


def steps(
    dataset: TokenDataset, first: int, stop: int, ranges: list[tuple[int, int]] | None = None
) -> list[StepRows]:
    sampler = IndexSampler(dataset.num_examples, seed=5)
    return list(
        prefetch(
            sampler,
            dataset,
            first_step=first,
            stop_step=stop,
            global_batch_size=BATCH,
            ranges=[(0, BATCH)] if ranges is None else ranges,
        )
    )


def test_steps_come_in_order_with_the_samplers_ids(dataset: TokenDataset) -> None:
    num_steps = 2 * dataset.num_examples // BATCH + 1  # crosses epochs inside a step
    sampler = IndexSampler(dataset.num_examples, seed=5)
    found = steps(dataset, 0, num_steps)
    assert [step.step for step in found] == list(range(num_steps))
    ids = np.concatenate([step.ids for step in found])
    assert np.array_equal(ids, sampler.ids_of(0, num_steps * BATCH))
    for step in found:
        assert np.array_equal(step.rows.inputs, dataset.read(step.ids).inputs)


def test_a_stream_can_begin_at_any_step(dataset: TokenDataset) -> None:
    whole = steps(dataset, 0, 30)
    for first in (1, 7, 29, 30):
        later = steps(dataset, first, 30)
        assert [step.ids.tolist() for step in later] == [s.ids.tolist() for s in whole[first:]]


def test_processes_share_a_step_without_gap_or_overlap(dataset: TokenDataset) -> None:
    whole = steps(dataset, 3, 6)
    parts = [steps(dataset, 3, 6, ranges) for ranges in ([(0, 3)], [(3, 4), (6, 8)], [(4, 6)], [])]
    for number, step in enumerate(whole):
        first, outer, inner, idle = (part[number].ids for part in parts)
        assert [*first, *outer[:1], *inner, *outer[1:]] == step.ids.tolist()
        assert len(idle) == 0


class SlowReader:
    """Counts reads, and lets none end before it is told to."""

    def __init__(self, dataset: TokenDataset) -> None:
        self.dataset = dataset
        self.lock = threading.Lock()
        self.num_reads = 0
        self.gate = threading.Event()

    def read(self, ids: npt.NDArray[np.int64]) -> Rows:
        with self.lock:
            self.num_reads += 1
        assert self.gate.wait(10)
        return self.dataset.read(ids)


def test_it_reads_ahead_but_not_without_bound(dataset: TokenDataset) -> None:
    reader = SlowReader(dataset)
    stream = prefetch(
        IndexSampler(dataset.num_examples, 1),
        reader,
        first_step=0,
        stop_step=1000,
        global_batch_size=BATCH,
        ranges=[(0, 2)],
        num_threads=2,
        max_buffered_steps=3,
    )
    reader.gate.set()
    for number in range(5):
        assert next(stream).step == number
    assert 5 <= reader.num_reads <= 5 + 3 + 2


def test_an_error_while_reading_is_raised(dataset: TokenDataset) -> None:
    sampler = IndexSampler(dataset.num_examples + 10, seed=5)  # ids beyond the data
    stream = prefetch(
        sampler, dataset, first_step=0, stop_step=99, global_batch_size=BATCH, ranges=[(0, 8)]
    )
    with pytest.raises(DataError, match="example ids must be from 0"):
        list(stream)


@pytest.mark.parametrize("ranges", [[(0, BATCH + 1)], [(-1, 2)], [(3, 2)]])
def test_ranges_outside_the_batch_are_refused(
    dataset: TokenDataset, ranges: list[tuple[int, int]]
) -> None:
    with pytest.raises(ValueError, match="ranges must lie in"):
        steps(dataset, 0, 1, ranges)
