"""Arrays of a step written part by part, in a format of Orbax, in bounded memory.

The files are what Orbax makes without OCDBT: a folder with Zarr 2 metadata an array, and one
uncompressed file a chunk. Orbax itself takes whole trees only, so that an array would have to be
in memory at once; and in an OCDBT database every byte is copied several times on its way.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.store.direct_file import Bytes, DirectFile, bytes_of
from checkpoint.store.orbax_io import make_array_folder
from checkpoint.store.tree import HostArray

METADATA_FILE = "_METADATA"
_DICT_KEY = 2
"""Orbax's number for a key of a dict."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """One chunk of an array: one file.

    Attributes:
        name: of the array, with slashes.
        shape: of the whole array; no size is 0.
        chunk_shape: of all its chunks; those at the end are filled up with zeros.
        position: the chunk's number on each axis.
        values: what is inside the array, of its dtype.
    """

    name: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    position: tuple[int, ...]
    values: HostArray

    @property
    def path(self) -> str:
        """Relative to the arrays' folder."""
        return f"{self.name.replace('/', '.')}/{'.'.join(map(str, self.position)) or '0'}"

    @property
    def num_bytes(self) -> int:
        """Of the file."""
        return prod(self.chunk_shape) * self.values.dtype.itemsize

    def content(self) -> Bytes:
        """The file's bytes."""
        values = self.values
        if values.shape != self.chunk_shape:
            filled = np.zeros(self.chunk_shape, values.dtype)
            filled[tuple(slice(0, size) for size in values.shape)] = values
            values = filled
        return bytes_of(values)


class ArrayFiles:
    """A folder of arrays that is filled chunk by chunk; filling may go on in another process.

    Nothing is synced: all files are synced together before they count.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._made: set[str] = set()

    def write(self, chunk: Chunk) -> None:
        """Write a chunk. Raises OSError."""
        if chunk.name not in self._made:
            dtype = chunk.values.dtype.name
            make_array_folder(self._folder, chunk.name, dtype, chunk.shape, chunk.chunk_shape)
            self._made.add(chunk.name)
        with DirectFile(self._folder / chunk.path, chunk.num_bytes) as file:
            file.write(chunk.content(), 0)

    def holds(self, chunk: Chunk, ranges: Sequence[slice] = (slice(None),)) -> bool:
        """Whether the file, read again, is that chunk, or has `ranges` of its bytes.

        Raises OSError.
        """
        path = self._folder / chunk.path
        if not path.is_file() or path.stat().st_size != chunk.num_bytes:
            return False
        content = chunk.content()
        with DirectFile(path, chunk.num_bytes) as file:
            return all(file.holds(content[part], part.start or 0) for part in ranges)

    def finish(self, names: Iterable[str]) -> None:
        """Write the file by which Orbax knows the tree."""
        entries = {}
        for name in names:
            keys = name.split("/")
            entries[str(tuple(keys))] = {
                "key_metadata": [{"key": key, "key_type": _DICT_KEY} for key in keys],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
        metadata: dict[str, Any] = {
            "tree_metadata": entries,
            "use_ocdbt": False,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._folder / METADATA_FILE).write_text(json.dumps(metadata))
