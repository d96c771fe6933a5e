"""The plan of a migration: what each target array is made of. Nothing is read to make it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import lcm, prod
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType

from checkpoint.formats.gguf_blocks import row_bytes
from checkpoint.formats.gguf_q8_0 import ENCODER_BYTES
from checkpoint.migrate.errors import MigrationError
from checkpoint.migrate.parts import PartSource
from checkpoint.name_table import IDENTITY, Transform
from checkpoint.store.tree import DTYPES

NUM_BEING_WRITTEN = 3
"""Batches held beside those in flight: being hashed, being written, being taken into the digests
of files."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """An update to add: `scale * a @ b`, to the leaf `[in, out]`."""

    a: np.ndarray[Any, Any]
    """`float32[in, r]`"""
    b: np.ndarray[Any, Any]
    """`float32[r, out]`"""
    scale: float


@dataclass(frozen=True, slots=True)
class PlannedPart:
    """A target array, or one layer or expert of it: where its values come from.

    The source's values go through `to_leaf`'s way to the leaf and through `to_file`'s from
    the leaf to the target.
    """

    source: str
    """Name of the source's array."""
    index: tuple[int, ...]
    """Its place on the source's first axes, when those are layers or experts."""
    shape: tuple[int, ...]
    """Of this part in the target."""
    to_leaf: Transform = IDENTITY
    to_file: Transform = IDENTITY
    low_rank: LowRank | None = None

    @property
    def swaps_axes(self) -> bool:
        """Whether the part's rows are the source's columns."""
        return self.to_leaf.swaps_axes != self.to_file.swaps_axes

    @property
    def can_be_cut(self) -> bool:
        """Whether a range of its rows can be made alone."""
        return len(self.shape) >= 2 and self.low_rank is None

    @property
    def row_alignment(self) -> int:
        """Ranges of rows start and end at multiples of this."""
        groups = [self.to_file.num_groups, None if self.swaps_axes else self.to_leaf.num_groups]
        return lcm(*(self.shape[0] // group for group in groups if group)) if self.shape else 1


@dataclass(frozen=True, slots=True)
class PlannedArray:
    """One array of the target."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """NumPy's name, or a GGUF quantisation."""
    parts: tuple[PlannedPart, ...]
    """One, or one for each index of the first axes."""

    @property
    def stacked_shape(self) -> tuple[int, ...]:
        """The sizes of the axes that count the parts: none, layers, experts, or both."""
        return self.shape[: len(self.shape) - len(self.parts[0].shape)]

    @property
    def quantization(self) -> GGMLQuantizationType | None:
        """None for a plain dtype."""
        return None if self.dtype in DTYPES else GGMLQuantizationType[self.dtype]

    @property
    def num_bytes(self) -> int:
        """In the target."""
        if self.quantization is not None:
            return prod(self.shape[:-1]) * row_bytes(self.shape[-1], self.quantization)
        return prod(self.shape) * DTYPES[self.dtype].itemsize

    @property
    def num_part_bytes(self) -> int:
        """Of one part in the target."""
        return self.num_bytes // max(1, len(self.parts))


@dataclass(frozen=True, slots=True)
class Window:
    """A piece of work: rows `start` to `stop` of one part, whole rows of the target."""

    array: PlannedArray
    part_index: int
    start: int
    stop: int

    @property
    def part(self) -> PlannedPart:
        """What is computed."""
        return self.array.parts[self.part_index]

    @property
    def is_last(self) -> bool:
        """Whether the array is complete with it."""
        return self.part_index == len(self.array.parts) - 1 and self.stop == num_rows(self.part)

    @property
    def num_bytes(self) -> int:
        """In the target."""
        rows = max(1, num_rows(self.part))
        return self.array.num_part_bytes * (self.stop - self.start) // rows

    @property
    def offset_bytes(self) -> int:
        """In the target's array, from its start."""
        rows = max(1, num_rows(self.part))
        size = self.array.num_part_bytes
        return self.part_index * size + size // rows * self.start


def num_rows(part: PlannedPart) -> int:
    """Size of the first axis; 1 for a scalar."""
    return part.shape[0] if part.shape else 1


@dataclass(frozen=True)
class Plan:
    """All that will be done.

    Attributes:
        arrays: in the order in which they are written.
        settings: what else decides the result, e.g. the target's format; JSON values.
        notes: what a person should know.
        window_bytes: the aim for the memory of one window.
    """

    arrays: tuple[PlannedArray, ...]
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    window_bytes: int

    @cached_property
    def num_bytes(self) -> int:
        """Of all target arrays."""
        return sum(array.num_bytes for array in self.arrays)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides the result."""
        described = [
            self.settings,
            self.window_bytes,
            [
                [array.name, array.shape, array.dtype, [_described(part) for part in array.parts]]
                for array in self.arrays
            ],
        ]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    def windows(self, source: PartSource) -> Iterator[Window]:
        """The work in its order."""
        for array in self.arrays:
            for index, part in enumerate(array.parts):
                step = self.rows_a_window(array, part, source)
                rows = num_rows(part)
                for start in range(0, max(rows, 1), step):
                    yield Window(array, index, start, min(start + step, rows))

    def batches(self, source: PartSource) -> Iterator[tuple[Window, ...]]:
        """The windows in their order, small ones together: a batch takes no more memory than
        one window may."""
        batch: list[Window] = []
        num_bytes = 0
        for window in self.windows(source):
            cost = _cost(window, source)
            if batch and num_bytes + cost > self.window_bytes:
                yield tuple(batch)
                batch, num_bytes = [], 0
            batch.append(window)
            num_bytes += cost
        if batch:
            yield tuple(batch)

    def rows_a_window(self, array: PlannedArray, part: PlannedPart, source: PartSource) -> int:
        """How many rows of a part are made at a time."""
        rows = max(1, num_rows(part))
        if not part.can_be_cut or rows == 0:
            return rows
        cost = window_cost(array, part, source)
        if cost <= self.window_bytes:
            return rows
        wanted = max(1, self.window_bytes * rows // cost)
        return min(rows, max(1, wanted // part.row_alignment) * part.row_alignment)

    def max_batch_bytes(self, source: PartSource) -> int:
        """The most memory that one batch takes."""
        return max(
            (
                sum(_cost(window, source) for window in batch)
                + max(_passing_bytes(window, source) for window in batch)
                for batch in self.batches(source)
            ),
            default=0,
        )


def is_copied(array: PlannedArray, part: PlannedPart, source: PartSource) -> bool:
    """Whether the target has the source's bytes in their order."""
    return is_as_read(part) and source.stored_dtype(part.source) == array.dtype


def is_as_read(part: PlannedPart) -> bool:
    """Whether the source's values are the target's, in their order."""
    return part.to_leaf.name == part.to_file.name and part.low_rank is None


def block_rows(part: PlannedPart, source: PartSource) -> int | None:
    """How many of the source's rows are made columns of the target at a time; None where the
    part is not made so."""
    groups = part.to_leaf.num_groups or part.to_file.num_groups
    if not part.swaps_axes or groups or part.low_rank is not None or len(part.shape) != 2:
        return None
    return source.rows_at_once(part.source, len(part.index))


def window_cost(array: PlannedArray, part: PlannedPart, source: PartSource) -> int:
    """Bytes of memory for a whole part: as read, transformed, cast or encoded."""
    if is_copied(array, part, source):
        return array.num_part_bytes
    elements = prod(part.shape)
    read_bytes = elements * source.dtype(part.source).itemsize
    if block_rows(part, source) is not None and array.quantization is None:
        return array.num_part_bytes
    as_read = read_bytes * (2 if source.stored_dtype(part.source) not in DTYPES else 1)
    changed = (
        read_bytes if part.swaps_axes or part.to_leaf.num_groups or part.to_file.num_groups else 0
    )
    merged = elements * 12 if part.low_rank is not None else 0
    return as_read + changed + merged + array.num_part_bytes


def _cost(window: Window, source: PartSource) -> int:
    rows = window.stop - window.start
    return window_cost(window.array, window.part, source) * rows // max(1, num_rows(window.part))


def _passing_bytes(window: Window, source: PartSource) -> int:
    """Held while a window is computed, beside what its cost says."""
    part = window.part
    rows = block_rows(part, source)
    read = 0
    if rows is not None:
        read = rows * (window.stop - window.start) * source.dtype(part.source).itemsize
    if window.array.quantization is GGMLQuantizationType.Q8_0:
        read += ENCODER_BYTES
    return source.extra_bytes(part.source) + read


def max_in_flight(plan: Plan, source: PartSource, num_workers: int, memory_bytes: int) -> int:
    """How many batches may be in flight at once.

    Raises:
        MigrationError: not even one fits.
    """
    largest = max(1, plan.max_batch_bytes(source))
    num_fitting = memory_bytes // largest - NUM_BEING_WRITTEN
    if num_fitting < 1:
        needed = largest * (1 + NUM_BEING_WRITTEN)
        raise MigrationError(
            f"windows need {needed / 1e6:.0f} MB, and the memory budget leaves "
            f"{memory_bytes / 1e6:.0f} MB beside what the program itself takes; raise "
            f"--memory-budget by {(needed - memory_bytes) / 1e6 + 1:.0f} MB"
        )
    return min(num_workers + 2, num_fitting)


def _described(part: PlannedPart) -> list[Any]:
    low_rank = part.low_rank
    added = None
    if low_rank is not None:
        content = low_rank.a.tobytes() + low_rank.b.tobytes() + str(low_rank.scale).encode()
        added = hashlib.sha256(content).hexdigest()
    return [part.source, part.index, part.shape, part.to_leaf.name, part.to_file.name, added]
