"""GgufFile: the tensors and metadata of one GGUF file."""

from __future__ import annotations

import mmap
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from checkpoint.formats.gguf_blocks import PLAIN_DTYPES, decode_rows
from checkpoint.formats.gguf_header import TensorEntry, parse_header
from checkpoint.formats.location import TensorLocation
from checkpoint.tensor_source import TensorInfo


class GgufFile:
    """A TensorSource over a memory-mapped GGUF file.

    Quantised tensors are decoded to float32 one at a time, when read; F32, F16
    and BF16 keep their dtype. Shapes are row-major, `[out, in]` for a weight.

    Args:
        path: a regular file.

    Raises:
        FormatError: the file breaks a rule of the format, is not a regular
            file, or holds a tensor type that is not supported.
        OSError: the file cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._map = _map_file(self.path)
        header = parse_header(memoryview(self._map))
        self.metadata: Mapping[str, Any] = header.metadata
        self._tensors = header.tensors

    def names(self) -> Sequence[str]:
        """Tensor names in the file's order."""
        return tuple(self._tensors)

    def info(self, name: str) -> TensorInfo:
        """Shape, and the dtype in the file: "float32", or e.g. "Q4_1" when quantised."""
        entry = self._entry(name)
        plain = PLAIN_DTYPES.get(entry.type)
        return TensorInfo(shape=entry.shape, dtype=entry.type.name if plain is None else plain.name)

    def num_stored_bytes(self, name: str) -> int:
        """Bytes the tensor takes in the file, for progress."""
        return self._entry(name).num_bytes

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor's values: a new float32 array when it is stored quantised, else
        a read-only view of the file in its own dtype."""
        entry, raw = self._entry(name), self.raw(name)
        plain = PLAIN_DTYPES.get(entry.type)
        if plain is not None:
            return raw.view(plain).reshape(entry.shape)
        return decode_rows(raw, entry.shape[-1], entry.type).reshape(entry.shape)

    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes in the file, a read-only view."""
        entry = self._entry(name)
        return np.frombuffer(self._map, np.uint8, entry.num_bytes, entry.offset)

    def location(self, name: str) -> TensorLocation:
        """Where the bytes of `name` lie."""
        entry = self._entry(name)
        plain = PLAIN_DTYPES.get(entry.type)
        return TensorLocation(
            *(self.path, entry.offset, entry.num_bytes, entry.shape, plain),
            quantization=entry.type if plain is None else None,
        )

    def _entry(self, name: str) -> TensorEntry:
        try:
            return self._tensors[name]
        except KeyError:
            raise KeyError(f"no tensor {name!r} in {self.path.name}") from None


def _map_file(path: Path) -> mmap.mmap:
    # Non-blocking, so that opening a FIFO without a writer does not hang.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise FormatError(f"{path} is not a regular file")
        if status.st_size == 0:
            raise FormatError(f"{path} is empty, not a GGUF file")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)
