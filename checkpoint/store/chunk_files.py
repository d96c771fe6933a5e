"""ChunkFiles: an array whose chunks are plain files, as `array_files` writes them, read in place.

TensorStore reads the same files; it copies every byte three times more on the way.
"""

from __future__ import annotations

import itertools
import json
import os
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.store.tree import HostArray

METADATA = ".zarray"


class ChunkFiles:
    """See the module.

    Args:
        folder: of the array.
        shape: of the array.
        chunk_shape: of every chunk; those at the end are filled up.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], chunk_shape: tuple[int, ...]) -> None:
        self._folder = folder
        self.shape = shape
        self.chunk_shape = chunk_shape

    @classmethod
    def open(cls, folder: Path) -> ChunkFiles | None:
        """None if the array is stored in another way, e.g. compressed.

        Raises:
            ValueError: the metadata cannot be understood.
            OSError: it cannot be read.
        """
        path = folder / METADATA
        if not path.is_file():
            return None
        fields: Any = json.loads(path.read_bytes())
        try:
            plain = {"compressor": None, "filters": None, "order": "C", "zarr_format": 2}
            is_plain = all(fields[key] == value for key, value in plain.items())
            if not is_plain or fields.get("dimension_separator", ".") != ".":
                return None
            shape, chunk_shape = (tuple(map(int, fields[key])) for key in ("shape", "chunks"))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{METADATA} is not understood: {error!r}") from error
        if (
            not shape
            or len(shape) != len(chunk_shape)
            or any(size < 1 for size in (*shape, *chunk_shape))
        ):
            return None
        return cls(folder, shape, chunk_shape)

    def read_into(self, part: tuple[slice, ...], out: HostArray) -> None:
        """Fill `out`, of the part's shape and the array's dtype.

        Args:
            part: a slice for each axis, all of step 1.
            out: any strides; where it lies as in a file, nothing is copied.

        Raises:
            ValueError: a chunk is missing or of another size.
            OSError: the system refuses to read.
        """
        ranges = [axis.indices(size)[:2] for axis, size in zip(part, self.shape, strict=True)]
        numbers = (
            range(start // size, -(-stop // size))
            for (start, stop), size in zip(ranges, self.chunk_shape, strict=True)
        )
        for position in itertools.product(*numbers):
            inside, place = [], []
            for number, size, (start, stop) in zip(position, self.chunk_shape, ranges, strict=True):
                first, last = max(start, number * size), min(stop, (number + 1) * size)
                inside.append(slice(first - number * size, last - number * size))
                place.append(slice(first - start, last - start))
            self._read_chunk(position, inside, out[tuple(place)])

    def _read_chunk(self, position: tuple[int, ...], inside: list[slice], out: HostArray) -> None:
        """Read the rows that hold the part `inside` of a chunk: on the first axis on which it is
        more than one index, those indices with all of the axes after it."""
        axis = next(
            (number for number, kept in enumerate(inside) if kept.stop - kept.start != 1),
            len(inside) - 1,
        )
        row_shape, rest = self.chunk_shape[axis + 1 :], inside[axis + 1 :]
        first = 0
        for kept, size in zip(inside[: axis + 1], self.chunk_shape, strict=False):
            first = first * size + kept.start
        item_bytes = out.dtype.itemsize
        offset = first * prod(row_shape) * item_bytes
        file_bytes = prod(self.chunk_shape) * item_bytes
        path = self._folder / ".".join(map(str, position))
        is_whole = all(kept == slice(0, size) for kept, size in zip(rest, row_shape, strict=True))
        if is_whole and out.flags.c_contiguous:
            _read(path, file_bytes, offset, out)
            return
        rows = np.empty((inside[axis].stop - inside[axis].start, *row_shape), out.dtype)
        _read(path, file_bytes, offset, rows)
        out[...] = rows[(slice(None), *rest)].reshape(out.shape)


def _read(path: Path, file_bytes: int, offset: int, out: HostArray) -> None:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise ValueError(f"the chunk {path.name} is missing") from error
    try:
        if os.fstat(descriptor).st_size != file_bytes:
            raise ValueError(f"the chunk {path.name} has not the {file_bytes} bytes of a chunk")
        view = out.reshape(-1).view(np.uint8).data
        while view:
            num_read = os.preadv(descriptor, [view[: 1 << 30]], offset)
            if num_read == 0:
                raise ValueError(f"the chunk {path.name} ended while it was being read")
            view, offset = view[num_read:], offset + num_read
    finally:
        os.close(descriptor)
