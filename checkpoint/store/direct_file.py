"""DirectFile: a file of known size, written past the page cache where the file system can.

The page cache would copy every byte, and hold memory until the disk has caught up; a model is
written once and need not stay there. Blocks that a write fills only in part, and all of them on
a file system without direct transfers, go through the cache.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpoint.store.durable import start_writeback

Bytes: TypeAlias = npt.NDArray[np.uint8]

BLOCK_BYTES = 4096
"""Direct transfers begin and end at multiples of this, in the file and in memory."""
MIN_DIRECT_BYTES = 256 << 10
"""Less is left to the cache, which gathers it."""
READ_BYTES = 4 << 20
"""Read back at once."""


def buffer_at(offset: int, num_bytes: int) -> Bytes:
    """Uninitialised memory for bytes that shall lie at `offset` of a file.

    Whole blocks of the file are whole blocks of the memory, so that they need no copy.
    """
    raw = np.empty(num_bytes + BLOCK_BYTES, np.uint8)
    skipped = (offset - raw.ctypes.data) % BLOCK_BYTES
    return raw[skipped : skipped + num_bytes]


def bytes_of(values: npt.NDArray[Any]) -> Bytes:
    """The bytes of an array in C-order; a view if it is contiguous."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


class DirectFile:
    """An open file, made if it is not there; a context manager. Nothing is synced.

    Args:
        path: no link.
        num_bytes: its size from now on.

    Raises:
        OSError: from all methods.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        self._cached = os.open(path, flags, 0o644)
        self._direct: int | None = None
        try:
            os.ftruncate(self._cached, num_bytes)
            with contextlib.suppress(OSError):  # The file system has none.
                self._direct = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        for descriptor in (self._cached, self._direct):
            if descriptor is not None:
                os.close(descriptor)
        self._cached, self._direct = -1, None

    def write(self, data: Bytes, offset: int) -> None:
        """Write `data` at `offset`: without a copy if it lies in memory as `buffer_at` gives it."""
        is_placed = (data.ctypes.data - offset) % BLOCK_BYTES == 0
        for start, stop, is_direct in self._pieces(offset, len(data), is_placed):
            piece = data[start:stop]
            if is_direct and self._write_direct(piece, offset + start):
                continue
            _write_all(self._cached, piece, offset + start)
            if len(piece) >= MIN_DIRECT_BYTES:
                start_writeback(self._cached, offset + start, len(piece))

    def holds(self, data: Bytes, offset: int) -> bool:
        """Whether the file, read again from the disk where it can be, has `data` at `offset`."""
        found = buffer_at(0, min(READ_BYTES, len(data)) + BLOCK_BYTES)
        for start, stop, is_direct in self._pieces(offset, len(data), is_placed=True):
            descriptor = self._direct if is_direct and self._direct is not None else self._cached
            for first in range(start, stop, READ_BYTES):
                wanted = data[first : min(first + READ_BYTES, stop)]
                read = found[: len(wanted)]
                if os.preadv(descriptor, [read.data], offset + first) != len(wanted):
                    return False
                if not _equal(read, wanted):
                    return False
        return True

    def _pieces(
        self, offset: int, num_bytes: int, is_placed: bool
    ) -> Iterator[tuple[int, int, bool]]:
        """`(start, stop, is_direct)` of the data: whole blocks of the file, and what is left."""
        first = -offset % BLOCK_BYTES
        last = num_bytes - (offset + num_bytes) % BLOCK_BYTES
        if self._direct is None or not is_placed or last - first < MIN_DIRECT_BYTES:
            yield 0, num_bytes, False
            return
        if first:
            yield 0, first, False
        yield first, last, True
        if last < num_bytes:
            yield last, num_bytes, False

    def _write_direct(self, piece: Bytes, offset: int) -> bool:
        """False if the file system wants larger blocks than ours."""
        assert self._direct is not None
        try:
            _write_all(self._direct, piece, offset)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            os.close(self._direct)
            self._direct = None
            return False
        return True


def _write_all(descriptor: int, data: Bytes, offset: int) -> None:
    view = data.data
    while view:
        num_written = os.pwritev(descriptor, [view[: 1 << 30]], offset)
        view, offset = view[num_written:], offset + num_written


def _equal(first: Bytes, second: Bytes) -> bool:
    words = len(first) // 8 * 8  # Compared by eights: the answers take less room than the bytes.
    wide = np.array_equal(first[:words].view(np.uint64), second[:words].view(np.uint64))
    return wide and np.array_equal(first[words:], second[words:])
