"""Snapshots in shared memory: complete only when all have written, and verified."""

from __future__ import annotations

import os

import numpy as np
import pytest

from jaxserve.trainer.errors import MemoryFileError
from jaxserve.trainer.memory_file import NO_STEP, MemoryFile, Phase, whole_by_first

SIZE = 10_001
RANGES = [[(0, 4000)], [(4000, 6000), (10_000, 1)]]


def make(seed: int = 0) -> tuple[MemoryFile, MemoryFile, np.ndarray]:
    """A supervisor's and a trainer's side of one file, and a state."""
    mine = MemoryFile.create(2)
    mine.make_slots(SIZE)
    theirs = MemoryFile(os.dup(mine.fd), 2)
    theirs.attach_slots(SIZE)
    state = np.random.default_rng(seed).integers(0, 256, SIZE).astype(np.uint8)
    return mine, theirs, state


def write(memory: MemoryFile, slot: int, rank: int, step: int, state: np.ndarray) -> None:
    memory.begin_snapshot(slot, rank)
    for offset, size in RANGES[rank]:
        memory.slot(slot)[offset : offset + size] = state[offset : offset + size]
    memory.stamp(slot, rank, step, RANGES[rank])


def test_slot_is_complete_when_all_have_written() -> None:
    mine, theirs, state = make()
    assert mine.complete_step(0) == NO_STEP
    write(theirs, 0, 0, 7, state)
    assert mine.complete_step(0) == NO_STEP
    write(theirs, 0, 1, 7, state)
    assert mine.complete_step(0) == 7
    mine.verify(0, RANGES)
    np.testing.assert_array_equal(mine.slot(0), state)
    theirs.begin_snapshot(0, 1)
    assert mine.complete_step(0) == NO_STEP


def test_every_flipped_bit_is_found() -> None:
    mine, theirs, state = make()
    for rank in (0, 1):
        write(theirs, 1, rank, 3, state)
    for place in np.random.default_rng(1).integers(0, SIZE, 50):
        mine.slot(1)[place] ^= 1 << (place % 8)
        owner = 0 if place < 4000 else 1
        with pytest.raises(MemoryFileError, match=f"what trainer {owner} wrote"):
            mine.verify(1, RANGES)
        mine.slot(1)[place] ^= 1 << (place % 8)
    mine.verify(1, RANGES)


def test_ranges_must_cover_the_state() -> None:
    mine, _, _ = make()
    with pytest.raises(MemoryFileError, match="nobody writes the bytes from 4000 to 5000"):
        mine.verify(0, [[(0, 4000)], [(5000, 5001)]])
    with pytest.raises(MemoryFileError, match="two trainers write"):
        mine.verify(0, [[(0, 4000)], [(3999, 6002)]])
    with pytest.raises(MemoryFileError, match="write 4000 bytes of a state of 10001"):
        mine.verify(0, [[(0, 4000)], []])


def test_state_put_by_the_supervisor_counts() -> None:
    mine, theirs, state = make()
    mine.put(0, 12, state)
    assert theirs.complete_step(0) == 12
    theirs.verify(0, whole_by_first(SIZE, 2))
    np.testing.assert_array_equal(theirs.slot(0), state)


def test_status_rows_are_shared() -> None:
    mine, theirs, _ = make()
    theirs.set_phase(1, Phase.EXCHANGING, 5)
    theirs.beat(1)
    status = mine.status(1)
    assert (status.phase, status.step) == (Phase.EXCHANGING, 5)
    assert status.alive_s >= status.phase_since_s > 0
    assert mine.status(0).step == 0
