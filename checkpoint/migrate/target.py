"""Targets of a migration: files with tensors at fixed offsets, and steps of a store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpoint.migrate.parts import PartSource
from checkpoint.migrate.plan import Plan, Window
from checkpoint.store.array_files import ArrayFiles
from checkpoint.store.layout import ARRAYS
from checkpoint.store.orbax_io import ArrayReader

Array: TypeAlias = npt.NDArray[Any]
FileDigests: TypeAlias = dict[str, tuple[int, str]]
"""Size in bytes and SHA-256, by path relative to the target's folder."""

COMPARE_BYTES = 4 << 20


class Target(Protocol):
    """Where windows go, all of them, in the plan's order."""

    def write(self, window: Window, values: Array) -> None:
        """Write one window's values. Raises OSError, ValueError."""
        ...

    def holds(self, window: Window, values: Array) -> bool:
        """Whether the files, read again, hold these values."""
        ...

    def add(self, window: Window, values: Array) -> None:
        """Take the values, which `holds` has found to be there, into the files' digests."""
        ...

    def finish(self) -> FileDigests:
        """The digests of the files that are complete with this; others are read later."""
        ...

    def close(self) -> None:
        """Lets go of files."""
        ...


@dataclass(frozen=True)
class FileLayout:
    """One file of the target.

    Attributes:
        name: inside the target's folder.
        header: its first bytes.
        num_bytes: its size.
        offsets: of its arrays, from the file's start.
    """

    name: str
    header: bytes
    num_bytes: int
    offsets: Mapping[str, int]


class _File:
    """One file that is being made, and the digest of what it should hold so far."""

    def __init__(self, folder: Path, layout: FileLayout) -> None:
        self.layout = layout
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self.descriptor = os.open(folder / layout.name, flags, 0o644)
        os.ftruncate(self.descriptor, layout.num_bytes)
        _write_all(self.descriptor, memoryview(layout.header), 0)
        self._hash = hashlib.sha256(layout.header)
        self._hashed_bytes = len(layout.header)

    def add(self, offset: int, values: memoryview) -> None:
        self._pad_to(offset)
        self._hash.update(values)
        self._hashed_bytes += len(values)

    def finish(self) -> tuple[int, str]:
        self._pad_to(self.layout.num_bytes)
        return self.layout.num_bytes, self._hash.hexdigest()

    def _pad_to(self, offset: int) -> None:
        if offset < self._hashed_bytes:
            raise AssertionError(f"{self.layout.name}: arrays are not written in their order")
        self._hash.update(bytes(offset - self._hashed_bytes))
        self._hashed_bytes = offset


class FileTarget:
    """Files whose layout is known before any tensor is."""

    def __init__(self, folder: Path, layouts: tuple[FileLayout, ...]) -> None:
        self._files: list[_File] = []
        self._of_array: dict[str, _File] = {}
        for layout in layouts:
            file = _File(folder, layout)
            self._files.append(file)
            self._of_array.update(dict.fromkeys(layout.offsets, file))
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="migrate-hash")
        self._hashing: Future[None] | None = None

    def write(self, window: Window, values: Array) -> None:
        """See Target."""
        file, offset = self._place(window)
        _write_all(file.descriptor, _bytes(values), offset)

    def holds(self, window: Window, values: Array) -> bool:
        """See Target."""
        file, offset = self._place(window)
        wanted = _bytes(values)
        for start in range(0, len(wanted), COMPARE_BYTES):
            piece = wanted[start : start + COMPARE_BYTES]
            found = os.pread(file.descriptor, len(piece), offset + start)
            if not np.array_equal(np.frombuffer(found, np.uint8), np.frombuffer(piece, np.uint8)):
                return False
        return True

    def add(self, window: Window, values: Array) -> None:
        """See Target. Works in a thread of its own, one window behind at most."""
        file, offset = self._place(window)
        self._wait()
        self._hashing = self._hasher.submit(file.add, offset, _bytes(values))

    def finish(self) -> FileDigests:
        """See Target."""
        self._wait()
        return {file.layout.name: file.finish() for file in self._files}

    def close(self) -> None:
        """See Target."""
        self._hasher.shutdown()
        while self._files:
            os.close(self._files.pop().descriptor)

    def _wait(self) -> None:
        if self._hashing is not None:
            self._hashing.result()

    def _place(self, window: Window) -> tuple[_File, int]:
        file = self._of_array[window.array.name]
        return file, file.layout.offsets[window.array.name] + window.offset_bytes


class StoreTarget:
    """Array files of a step that is being made in `folder`.

    Args:
        folder: of the step.
        plan, source: give the arrays' chunks: one for each window.
        is_committed: the step was complete already when this process began.
    """

    def __init__(self, folder: Path, plan: Plan, source: PartSource, *, is_committed: bool) -> None:
        self._folder = folder / ARRAYS
        self._plan = plan
        self._is_committed = is_committed
        self._folder.mkdir(parents=True, exist_ok=True)
        self._files = ArrayFiles(self._folder)
        self._rows = {
            array.name: plan.rows_a_window(array, array.parts[0], source) for array in plan.arrays
        }

    def write(self, window: Window, values: Array) -> None:
        """See Target."""
        array, part = window.array, window.part
        if 0 in array.shape:
            return
        if self._is_committed:
            raise ValueError(f"{array.name} of the finished step is damaged; pass --restart")
        chunk = (self._rows[array.name], *part.shape[1:]) if part.shape else ()
        if array.is_stacked:
            chunk = (1, *chunk)
        self._files.write(
            array.name,
            _index(window),
            values[None] if array.is_stacked else values,
            shape=array.shape,
            chunk_shape=chunk,
        )

    def holds(self, window: Window, values: Array) -> bool:
        """See Target."""
        if 0 in window.array.shape:
            return True
        try:
            # A new reader sees nothing that was cached.
            found = ArrayReader(self._folder).read_part(window.array.name, _index(window))
        except (ValueError, OSError):
            return False
        return np.array_equal(
            np.frombuffer(_bytes(found), np.uint8), np.frombuffer(_bytes(values), np.uint8)
        )

    def add(self, window: Window, values: Array) -> None:
        """See Target: the files' digests are taken when the step is committed."""

    def finish(self) -> FileDigests:
        """See Target. Writes what Orbax needs beside the arrays."""
        if not self._is_committed:
            self._files.finish(array.name for array in self._plan.arrays if 0 not in array.shape)
        return {}

    def close(self) -> None:
        """See Target."""


def _index(window: Window) -> tuple[slice, ...]:
    """Where a window lies in its array."""
    rows: tuple[slice, ...] = (slice(window.start, window.stop),) if window.part.shape else ()
    if window.array.is_stacked:
        return (slice(window.part_index, window.part_index + 1), *rows)
    return rows


def _bytes(values: Array) -> memoryview:
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


def _write_all(descriptor: int, view: memoryview, offset: int) -> None:
    while view:
        num_written = os.pwritev(descriptor, [view[: 1 << 30]], offset)
        view, offset = view[num_written:], offset + num_written
