"""Parts of tensors, read without holding the tensor: for files and for stored steps.

Files are read with `pread`, not mapped: a truncated file or a failing disk is then an error
of the call, and what was read does not stay in the process's memory.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from checkpoint.formats.gguf_blocks import decode_rows
from checkpoint.formats.location import TensorLocation
from checkpoint.store.open_step import OpenStep

Array: TypeAlias = npt.NDArray[Any]

BLOCK_BYTES = 8 << 20
"""When only some columns are wanted, rows are read in blocks of this size."""


class PartSource(Protocol):
    """Named arrays, of which any rectangle can be read; safe to use from many threads."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of `name`."""
        ...

    def dtype(self, name: str) -> np.dtype[Any]:
        """Dtype of the values that `read_part` gives: float32 for quantised tensors."""
        ...

    def stored_dtype(self, name: str) -> str:
        """Name of the dtype or the quantisation in the file."""
        ...

    def read_part(self, name: str, index: tuple[slice, ...]) -> Array:
        """The values at `index`, which has a slice for each axis, all of step 1."""
        ...

    def read_into(self, name: str, index: tuple[slice, ...], out: Array) -> None:
        """Fill `out`, C-order and of this shape and dtype, as `read_part` would; without a copy
        where the values lie so."""
        ...

    def rows_at_once(self, name: str, axis: int) -> int:
        """How many indices of an axis are best read together, with all of the axes after it or
        with some."""
        ...

    @property
    def can_cut(self) -> bool:
        """Whether a few indices of the first axis after another are read as fast as many."""
        ...

    def extra_bytes(self, name: str) -> int:
        """Memory that reading any part takes beside the part itself."""
        ...

    def close(self) -> None:
        """Lets go of files."""
        ...


class FileParts:
    """A PartSource over safetensors and GGUF files."""

    def __init__(
        self, names: Mapping[str, TensorLocation] | Callable[[str], TensorLocation]
    ) -> None:
        self._location = names if callable(names) else names.__getitem__
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()

    def shape(self, name: str) -> tuple[int, ...]:
        """See PartSource."""
        return self._location(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """See PartSource."""
        return self._location(name).dtype or np.dtype(np.float32)

    def stored_dtype(self, name: str) -> str:
        """See PartSource."""
        location = self._location(name)
        return location.dtype.name if location.dtype else str(location.quantization.name)  # type: ignore[union-attr]

    def rows_at_once(self, name: str, axis: int) -> int:
        """See PartSource."""
        location = self._location(name)
        return max(1, BLOCK_BYTES * prod(location.shape[: axis + 1]) // max(1, location.num_bytes))

    @property
    def can_cut(self) -> bool:
        """See PartSource."""
        return True

    def extra_bytes(self, name: str) -> int:
        """See PartSource."""
        location = self._location(name)
        return min(location.num_bytes, BLOCK_BYTES) * (1 if location.quantization is None else 3)

    def read_part(self, name: str, index: tuple[slice, ...]) -> Array:
        """See PartSource. Raises OSError, FormatError."""
        location = self._location(name)
        if not location.shape:
            return self._read_rows(location, 0, 1).reshape(())
        start, stop, _ = index[0].indices(location.shape[0])
        rest = index[1:]
        if _is_whole(rest, location.shape[1:]):
            return self._read_rows(location, start, stop)
        step = self.rows_at_once(name, 0)
        blocks = (
            self._read_rows(location, first, min(first + step, stop))[(slice(None), *rest)]
            for first in range(start, stop, step)
        )
        first_block = next(blocks)
        out = np.empty((stop - start, *first_block.shape[1:]), first_block.dtype)
        out[: len(first_block)] = first_block
        done = len(first_block)
        for block in blocks:
            out[done : done + len(block)] = block
            done += len(block)
        return out

    def read_into(self, name: str, index: tuple[slice, ...], out: Array) -> None:
        """See PartSource. Raises OSError, FormatError."""
        location = self._location(name)
        if location.dtype is None or not index or not _is_whole(index[1:], location.shape[1:]):
            out[...] = self.read_part(name, index)
        elif out.size:
            first = index[0].indices(location.shape[0])[0] * (out.nbytes // len(out))
            self._read_bytes(location, location.offset + first, out.reshape(-1).view(np.uint8))

    def close(self) -> None:
        """See PartSource."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def _read_rows(self, location: TensorLocation, start: int, stop: int) -> Array:
        if location.shape and 0 in location.shape:
            return np.empty((stop - start, *location.shape[1:]), location.dtype or np.float32)
        if location.quantization is not None and len(location.shape) == 1:
            return self._read_quantized_vector(location)[start:stop]
        bytes_a_row = location.num_bytes // (location.shape[0] if location.shape else 1)
        raw = np.empty((stop - start) * bytes_a_row, np.uint8)
        self._read_bytes(location, location.offset + start * bytes_a_row, raw)
        shape = (stop - start, *location.shape[1:])
        if location.dtype is not None:
            return raw.view(location.dtype).reshape(shape)
        assert location.quantization is not None
        return decode_rows(raw, location.shape[-1], location.quantization).reshape(shape)

    def _read_quantized_vector(self, location: TensorLocation) -> Array:
        """All of it, since a block has many elements."""
        assert location.quantization is not None
        raw = np.empty(location.num_bytes, np.uint8)
        self._read_bytes(location, location.offset, raw)
        return decode_rows(raw, location.shape[0], location.quantization).reshape(-1)

    def _read_bytes(
        self, location: TensorLocation, offset: int, out: npt.NDArray[np.uint8]
    ) -> None:
        descriptor = self._descriptor(location.path)
        view = out.data
        while view:
            num_read = os.preadv(descriptor, [view[: 1 << 30]], offset)
            if num_read == 0:
                raise FormatError(
                    f"{location.path.name} ended at byte {offset} while it was being read; "
                    "has it been cut short since?"
                )
            view, offset = view[num_read:], offset + num_read

    def _descriptor(self, path: Path) -> int:
        with self._lock:
            if path not in self._descriptors:
                descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
                if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                    os.close(descriptor)
                    raise FormatError(f"{path} is not a regular file")
                with contextlib.suppress(OSError):
                    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)
                self._descriptors[path] = descriptor
            return self._descriptors[path]


class StepParts:
    """A PartSource over a stored step, whose files must have been checked before."""

    def __init__(self, step: OpenStep) -> None:
        self._step = step
        self._chunk_shapes: dict[str, tuple[int, ...]] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """See PartSource."""
        return self._step.arrays[name].shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """See PartSource."""
        return np.dtype(self._step.arrays[name].dtype)

    def stored_dtype(self, name: str) -> str:
        """See PartSource."""
        return self._step.arrays[name].dtype

    def rows_at_once(self, name: str, axis: int) -> int:
        """See PartSource."""
        return 1 if 0 in self.shape(name) else self._chunk_shape(name)[axis]

    @property
    def can_cut(self) -> bool:
        """See PartSource: a chunk is read as a whole."""
        return False

    def extra_bytes(self, name: str) -> int:
        """See PartSource: a chunk is read as a whole."""
        if 0 in self.shape(name):
            return 0
        return prod(self._chunk_shape(name)) * self.dtype(name).itemsize

    def read_part(self, name: str, index: tuple[slice, ...]) -> Array:
        """See PartSource. Raises CorruptStep, StoreUnreadable."""
        ranges = [
            part.indices(size)[:2] for part, size in zip(index, self.shape(name), strict=True)
        ]
        out = np.empty(tuple(stop - start for start, stop in ranges), self.dtype(name))
        self.read_into(name, index, out)
        return out

    def read_into(self, name: str, index: tuple[slice, ...], out: Array) -> None:
        """See PartSource. Raises CorruptStep, StoreUnreadable."""
        shape = self.shape(name)
        ranges = [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]
        sizes = tuple(stop - start for start, stop in ranges)
        if out.size == 0:
            return
        # One chunk after the other along the first axis of which more than one is wanted: all at
        # once, TensorStore would hold every chunk that is touched.
        axis = next((number for number, size in enumerate(sizes[:-1]) if size != 1), 0)
        if not shape:
            out[...] = self._step.read_part(name, ())
            return
        step = max(1, self._chunk_shape(name)[axis])
        first, last = ranges[axis]
        begin = first
        while begin < last:
            end = min(last, (begin // step + 1) * step)
            source = [slice(start, stop) for start, stop in ranges]
            source[axis] = slice(begin, end)
            target = [slice(None)] * len(shape)
            target[axis] = slice(begin - first, end - first)
            self._step.read_into(name, tuple(source), out[tuple(target)])
            begin = end

    def close(self) -> None:
        """See PartSource."""
        self._step.close()

    def _chunk_shape(self, name: str) -> tuple[int, ...]:
        if name not in self._chunk_shapes:
            self._chunk_shapes[name] = self._step.chunk_shape(name)
        return self._chunk_shapes[name]


def _is_whole(index: tuple[slice, ...], shape: tuple[int, ...]) -> bool:
    return all(part.indices(size)[:2] == (0, size) for part, size in zip(index, shape, strict=True))
