"""Arrays of a step written part by part, in a format of Orbax, in bounded memory.

The files are what Orbax makes without OCDBT: a folder with Zarr 2 metadata an array, and one
uncompressed file a chunk. Orbax itself takes whole trees only, so that an array would have to be
in memory at once; and in an OCDBT database every byte is copied several times on its way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint.store.durable import start_writeback
from checkpoint.store.orbax_io import make_array_folder
from checkpoint.store.tree import HostArray

METADATA_FILE = "_METADATA"
_DICT_KEY = 2
"""Orbax's number for a key of a dict."""
COMPARE_BYTES = 1 << 20
"""At once, so that both sides stay in the processor's cache."""


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

    def content(self) -> npt.NDArray[np.uint8]:
        """The file's bytes."""
        values = self.values
        if values.shape != self.chunk_shape:
            filled = np.zeros(self.chunk_shape, values.dtype)
            filled[tuple(slice(0, size) for size in values.shape)] = values
            values = filled
        return np.ascontiguousarray(values).reshape(-1).view(np.uint8)


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
        with (self._folder / chunk.path).open("wb", buffering=0) as file:
            view = chunk.content().data
            while view:
                view = view[file.write(view[: 1 << 30]) :]

    def holds(self, chunk: Chunk) -> bool:
        """Whether the file, read again, is that chunk; then it is on its way to the disk.

        Raises OSError.
        """
        wanted = chunk.content()
        found = np.empty(min(COMPARE_BYTES, len(wanted)), np.uint8)
        try:
            file = (self._folder / chunk.path).open("rb", buffering=0)
        except FileNotFoundError:
            return False
        with file:
            if os.fstat(file.fileno()).st_size != len(wanted):
                return False
            for start in range(0, len(wanted), COMPARE_BYTES):
                piece = wanted[start : start + COMPARE_BYTES]
                num_read = file.readinto(found[: len(piece)].data)
                if num_read != len(piece) or not np.array_equal(found[: len(piece)], piece):
                    return False
            start_writeback(file.fileno(), 0, len(wanted))
        return True

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
