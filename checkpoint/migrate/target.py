"""Targets of a migration: files with tensors at fixed offsets, and steps of a store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from checkpoint.migrate.errors import naming
from checkpoint.migrate.parts import PartSource
from checkpoint.migrate.plan import Plan, Window
from checkpoint.migrate.read_back import ReadBack
from checkpoint.store.array_files import ArrayFiles, Chunk
from checkpoint.store.direct_file import Bytes, DirectFile, buffer_at, bytes_of
from checkpoint.store.layout import ARRAYS

Array: TypeAlias = npt.NDArray[Any]
Piece: TypeAlias = tuple[Window, Array]
"""A window and its values."""
FileDigests: TypeAlias = dict[str, tuple[int, str]]
"""Size in bytes and BLAKE3, by path relative to the target's folder."""


class Target(Protocol):
    """Where windows go, all of them, in the plan's order, in batches."""

    def buffer(self, window: Window) -> Bytes:
        """Memory for a window's bytes, from which they are written without a copy."""
        ...

    def write(self, pieces: Sequence[Piece]) -> None:
        """Write a batch. Raises WriteFailed, ValueError."""
        ...

    def holds(self, pieces: Sequence[Piece], parts: ReadBack = ReadBack.FULL) -> list[bool]:
        """For each piece whether the files, read again, hold `parts` of its values.

        Raises WriteFailed."""
        ...

    def add(self, pieces: Sequence[Piece]) -> None:
        """Take a batch, which `holds` has found to be there, into the files' digests."""
        ...

    def finish(self) -> FileDigests:
        """The digests of the files that are complete with this, by path relative to the folder
        that the target was opened in; others are read later."""
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
        self.data = DirectFile(folder / layout.name, layout.num_bytes)
        self.data.write(np.frombuffer(layout.header, np.uint8), 0)
        self._hash = blake3(layout.header)
        self._hashed_bytes = len(layout.header)

    def add(self, offset: int, values: Bytes) -> None:
        self._pad_to(offset)
        self._hash.update(values.data)
        self._hashed_bytes += len(values)

    def finish(self) -> tuple[int, str]:
        self._pad_to(self.layout.num_bytes)
        return self.layout.num_bytes, self._hash.hexdigest()

    def _pad_to(self, offset: int) -> None:
        if offset < self._hashed_bytes:
            raise AssertionError(f"{self.layout.name}: arrays are not written in their order")
        self._hash.update(bytes(offset - self._hashed_bytes))
        self._hashed_bytes = offset


class _OneBehind:
    """Work in a thread of its own, one after the other; at most one waits or runs."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="migrate-hash")
        self._running: Future[None] | None = None

    def submit(self, work: Callable[[Sequence[Piece]], None], pieces: Sequence[Piece]) -> None:
        """Returns when the work before is done. Raises what that raised."""
        self.wait()
        self._running = self._thread.submit(work, pieces)

    def wait(self) -> None:
        """Returns when all is done. Raises what it raised."""
        if self._running is not None:
            self._running.result()

    def close(self) -> None:
        """Ends the thread."""
        self._thread.shutdown()


class FileTarget:
    """Files whose layout is known before any tensor is."""

    def __init__(self, folder: Path, layouts: tuple[FileLayout, ...]) -> None:
        self._files: list[_File] = []
        self._of_array: dict[str, _File] = {}
        for layout in layouts:
            file = _File(folder, layout)
            self._files.append(file)
            self._of_array.update(dict.fromkeys(layout.offsets, file))
        self._hasher = _OneBehind()

    def buffer(self, window: Window) -> Bytes:
        """See Target."""
        return buffer_at(self._place(window)[1], window.num_bytes)

    def write(self, pieces: Sequence[Piece]) -> None:
        """See Target."""
        for window, values in pieces:
            file, offset = self._place(window)
            with naming(window.array.name, "written"):
                file.data.write(bytes_of(values), offset)

    def holds(self, pieces: Sequence[Piece], parts: ReadBack = ReadBack.FULL) -> list[bool]:
        """See Target."""
        return [self._holds(window, values, parts) for window, values in pieces]

    def _holds(self, window: Window, values: Array, parts: ReadBack) -> bool:
        file, offset = self._place(window)
        wanted = bytes_of(values)
        with naming(window.array.name, "read back"):
            return all(
                file.data.holds(wanted[part], offset + part.start)
                for part in parts.slices(len(wanted))
            )

    def add(self, pieces: Sequence[Piece]) -> None:
        """See Target."""
        self._hasher.submit(self._add, pieces)

    def _add(self, pieces: Sequence[Piece]) -> None:
        for window, values in pieces:
            file, offset = self._place(window)
            file.add(offset, bytes_of(values))

    def finish(self) -> FileDigests:
        """See Target."""
        self._hasher.wait()
        return {file.layout.name: file.finish() for file in self._files}

    def close(self) -> None:
        """See Target."""
        self._hasher.close()
        while self._files:
            self._files.pop().data.close()

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
        self._hasher = _OneBehind()
        self._digests: FileDigests = {}
        self._rows = {
            array.name: plan.rows_a_window(array, array.parts[0], source) for array in plan.arrays
        }

    def buffer(self, window: Window) -> Bytes:
        """See Target."""
        return buffer_at(0, window.num_bytes)

    def write(self, pieces: Sequence[Piece]) -> None:
        """See Target."""
        for window, values in pieces:
            if 0 in window.array.shape:
                continue
            if self._is_committed:
                raise ValueError(
                    f"{window.array.name} of the finished step is damaged; pass --restart"
                )
            with naming(window.array.name, "written"):
                self._files.write(self._chunk(window, values))

    def holds(self, pieces: Sequence[Piece], parts: ReadBack = ReadBack.FULL) -> list[bool]:
        """See Target."""
        return [self._holds(window, values, parts) for window, values in pieces]

    def add(self, pieces: Sequence[Piece]) -> None:
        """See Target."""
        self._hasher.submit(self._add, pieces)

    def finish(self) -> FileDigests:
        """See Target. Writes what Orbax needs beside the arrays."""
        self._hasher.wait()
        if not self._is_committed:
            self._files.finish(array.name for array in self._plan.arrays if 0 not in array.shape)
        return self._digests

    def close(self) -> None:
        """See Target."""
        self._hasher.close()

    def _holds(self, window: Window, values: Array, parts: ReadBack) -> bool:
        if 0 in window.array.shape:
            return True
        chunk = self._chunk(window, values)
        with naming(window.array.name, "read back"):
            return self._files.holds(chunk, parts.slices(chunk.num_bytes))

    def _add(self, pieces: Sequence[Piece]) -> None:
        for window, values in pieces:
            if 0 not in window.array.shape:
                chunk = self._chunk(window, values)
                content = chunk.content()
                digest = blake3(content.data).hexdigest()
                self._digests[f"{ARRAYS}/{chunk.path}"] = (len(content), digest)

    def _chunk(self, window: Window, values: Array) -> Chunk:
        array, part = window.array, window.part
        rows = self._rows[array.name]
        shape = (rows, *part.shape[1:]) if part.shape else ()
        position = (window.start // rows, *(0 for _ in part.shape[1:])) if part.shape else ()
        stacked = array.stacked_shape
        place = tuple(int(i) for i in np.unravel_index(window.part_index, stacked or (1,)))
        first = (1,) * len(stacked)
        position = (*place[: len(stacked)], *position)
        return Chunk(
            *(array.name, array.shape, (*first, *shape), position),
            values.reshape((*first, *values.shape)),
        )
