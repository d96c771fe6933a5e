"""Snapshots in shared memory: they outlive the trainers that write them.

One memory file a generation, made by the supervisor (memfd, no name in any file system)
and inherited by its trainers:

    status rows      one a trainer: heartbeat, phase, steps done; written by that trainer only
    slot headers     2 x one stamp a trainer: next step, bytes, digest (xxh3-64)
    slots            2 x the state; every trainer writes its own byte ranges

The steps below n are done when the next step is n. A slot is complete when all trainers
have stamped the same next step; while it is written, the other keeps the last snapshot.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from jaxserve.trainer.errors import MemoryFileError

Bytes = npt.NDArray[np.uint8]
Ranges = Sequence[tuple[int, int]]
"""(offset, size) in bytes, of the state."""

NUM_SLOTS = 2
NO_STEP = -1
_ROW_WORDS = 8
_ALIVE, _PHASE, _STEP, _PHASE_SINCE, _COMPUTED = range(5)
_STAMP_STEP, _STAMP_BYTES, _STAMP_DIGEST = range(3)
_ALIGN_BYTES = 4096


class Phase(enum.IntEnum):
    """What a trainer is doing."""

    STARTING = 0
    COMPILING = 1
    DATA = 2
    COMPUTING = 3
    EXCHANGING = 4
    SNAPSHOT = 5
    WAITING = 6
    EVALUATING = 7
    RESTORING = 8
    DONE = 9


@dataclass(frozen=True)
class Status:
    """A trainer's row.

    Attributes:
        alive_s: when its heartbeat thread last ran (monotonic clock, seconds).
        phase: what its main thread does.
        step: steps done.
        phase_since_s: since when (monotonic clock, seconds).
        computed_s: seconds that its own gradients took in its latest step; 0: none yet.
    """

    alive_s: float
    phase: Phase
    step: int
    phase_since_s: float
    computed_s: float = 0.0


@dataclass(frozen=True)
class Stamp:
    """What one trainer wrote into a slot."""

    step: int
    num_bytes: int
    digest: int


class MemoryFile:
    """The shared memory of one generation.

    Attributes:
        fd: its file descriptor, to hand to trainers.
        num_trainers: writers.
        state_bytes: size of a slot; 0 until `attach_slots`.
    """

    def __init__(self, fd: int, num_trainers: int) -> None:
        self.fd = fd
        self.num_trainers = num_trainers
        self.state_bytes = 0
        words = (1 + NUM_SLOTS) * num_trainers * _ROW_WORDS
        self._slots_at = _aligned(words * 8)
        self._slots: mmap.mmap | None = None
        self._table = mmap.mmap(fd, self._slots_at)
        table = np.frombuffer(self._table, np.int64, words).reshape(-1, num_trainers, _ROW_WORDS)
        self._status, self._stamps = table[0], table[1:]

    @classmethod
    def create(cls, num_trainers: int) -> MemoryFile:
        """A new one, with no snapshot and as yet no room for one."""
        fd = os.memfd_create("jaxserve-snapshots", os.MFD_CLOEXEC)
        os.ftruncate(fd, _aligned((1 + NUM_SLOTS) * num_trainers * _ROW_WORDS * 8))
        made = cls(fd, num_trainers)
        made._stamps[:, :, _STAMP_STEP] = NO_STEP
        return made

    def make_slots(self, state_bytes: int) -> None:
        """The supervisor's part once the state's size is known: makes room and attaches it."""
        os.ftruncate(self.fd, self._slots_at + NUM_SLOTS * _aligned(state_bytes))
        self.attach_slots(state_bytes)

    def attach_slots(self, state_bytes: int) -> None:
        """Maps the slots, for which `make_slots` has made room."""
        self.state_bytes = state_bytes
        size = NUM_SLOTS * _aligned(state_bytes)
        self._slots = mmap.mmap(self.fd, size, offset=self._slots_at)

    def close(self) -> None:
        """Gives the memory back, once no view of it is left."""
        del self._status, self._stamps
        os.close(self.fd)
        for mapped in (self._table, self._slots):
            with contextlib.suppress(BufferError):  # A view still lives; it goes with that.
                if mapped is not None:
                    mapped.close()

    def slot(self, slot: int) -> Bytes:
        """A slot's bytes, uint8[state_bytes], shared."""
        assert self._slots is not None, "attach_slots comes first"
        at = slot * _aligned(self.state_bytes)
        return np.frombuffer(self._slots, np.uint8, self.state_bytes, at)

    # Status rows.

    def beat(self, rank: int) -> None:
        """Trainer `rank`'s process is alive."""
        self._status[rank, _ALIVE] = time.monotonic_ns()

    def set_phase(self, rank: int, phase: Phase, step: int) -> None:
        """Trainer `rank` begins `phase` with `step` steps done."""
        row = self._status[rank]
        row[_PHASE], row[_STEP], row[_PHASE_SINCE] = phase, step, time.monotonic_ns()

    def begin_exchange(self, rank: int) -> None:
        """Trainer `rank` has its own gradients and waits for those of the others."""
        row, now_ns = self._status[rank], time.monotonic_ns()
        row[_COMPUTED] = now_ns - row[_PHASE_SINCE]
        row[_PHASE], row[_PHASE_SINCE] = Phase.EXCHANGING, now_ns

    def status(self, rank: int) -> Status:
        """The row of trainer `rank`."""
        row = [int(word) for word in self._status[rank]]
        return Status(
            row[_ALIVE] / 1e9, Phase(row[_PHASE]), row[_STEP], row[_PHASE_SINCE] / 1e9,
            row[_COMPUTED] / 1e9,
        )  # fmt: skip

    # Snapshots.

    def begin_snapshot(self, slot: int, rank: int) -> None:
        """What trainer `rank` has in `slot` no longer counts."""
        self._stamps[slot, rank, _STAMP_STEP] = NO_STEP

    def stamp(self, slot: int, rank: int, step: int, ranges: Ranges) -> None:
        """Trainer `rank` has written its `ranges` of the state after `step` steps."""
        row = self._stamps[slot, rank]
        row[_STAMP_BYTES] = sum(size for _, size in ranges)
        row[_STAMP_DIGEST] = np.uint64(self._digest(slot, ranges)).astype(np.int64)
        row[_STAMP_STEP] = step

    def put(self, slot: int, step: int, state: Bytes) -> None:
        """Fills `slot` with a whole state, in the name of all trainers."""
        self.slot(slot)[:] = state
        for rank, ranges in enumerate(whole_by_first(self.state_bytes, self.num_trainers)):
            self.stamp(slot, rank, step, ranges)

    def read_stamp(self, slot: int, rank: int) -> Stamp:
        """What trainer `rank` last stamped in `slot`."""
        row = self._stamps[slot, rank]
        digest = int(row[_STAMP_DIGEST]) & (2**64 - 1)
        return Stamp(int(row[_STAMP_STEP]), int(row[_STAMP_BYTES]), digest)

    def complete_step(self, slot: int) -> int:
        """The step that all trainers stamped in `slot`, or NO_STEP."""
        steps = {int(step) for step in self._stamps[slot, :, _STAMP_STEP]}
        return steps.pop() if len(steps) == 1 else NO_STEP

    def verify(self, slot: int, ranges_by_rank: Sequence[Ranges]) -> None:
        """Checks that the trainers' ranges make up the whole state and have their digests.

        Args:
            slot: which.
            ranges_by_rank: what each trainer writes.

        Raises:
            MemoryFileError: names the trainer or the gap.
        """
        _check_cover(ranges_by_rank, self.state_bytes)
        for rank, ranges in enumerate(ranges_by_rank):
            stamp = self.read_stamp(slot, rank)
            if stamp.digest != self._digest(slot, ranges):
                raise MemoryFileError(
                    f"the snapshot of step {stamp.step} is damaged: what trainer {rank} wrote "
                    "does not have its digest"
                )

    def _digest(self, slot: int, ranges: Ranges) -> int:
        state = self.slot(slot)
        hashed = xxhash.xxh3_64()
        for offset, size in ranges:
            hashed.update(_buffer(state[offset : offset + size]))
        return hashed.intdigest()


def whole_by_first(state_bytes: int, num_trainers: int) -> list[Ranges]:
    """The ranges of each trainer when one writes everything: a state that was put there."""
    return [[(0, state_bytes)], *([] for _ in range(num_trainers - 1))]


def _check_cover(ranges_by_rank: Sequence[Ranges], state_bytes: int) -> None:
    end = 0
    for offset, size in sorted((o, s) for ranges in ranges_by_rank for o, s in ranges if s):
        if offset != end:
            what = "nobody writes" if offset > end else "two trainers write"
            raise MemoryFileError(
                f"{what} the bytes from {min(offset, end)} to {max(offset, end)} of the state"
            )
        end = offset + size
    if end != state_bytes:
        raise MemoryFileError(f"the trainers write {end} bytes of a state of {state_bytes}")


def _buffer(view: Bytes) -> Any:
    return view.data


def _aligned(size: int) -> int:
    return -(-size // _ALIGN_BYTES) * _ALIGN_BYTES
