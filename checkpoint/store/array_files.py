"""Arrays of a step written part by part, in the format of `orbax_io`, in bounded memory.

The files are what Orbax makes: an OCDBT database of Zarr 2 arrays, uncompressed. Orbax itself
takes whole trees only, so that an array would have to be in memory at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import tensorstore as ts

from checkpoint.store.tree import DTYPES, HostArray

METADATA_FILE = "_METADATA"
_DICT_KEY = 2
"""Orbax's number for a key of a dict."""


class ArrayFiles:
    """A folder of arrays that is filled part by part; filling may go on in another process."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._opened: dict[str, ts.TensorStore] = {}
        # Not synced write by write: all files are synced together before they count.
        self._context = ts.Context({"file_io_sync": False})

    def write(
        self,
        name: str,
        part: tuple[slice, ...],
        values: HostArray,
        *,
        shape: tuple[int, ...],
        chunk_shape: tuple[int, ...],
    ) -> None:
        """Write `values` at `part` of the array `name`; they are in the files when it returns.

        Args:
            name: with slashes.
            part: one slice an axis.
            values: of the array's dtype.
            shape: of the whole array.
            chunk_shape: the parts that can be read alone; a write should fill whole ones.

        Raises:
            OSError: the system refuses.
        """
        try:
            if name not in self._opened:
                self._opened[name] = self._open(name, values.dtype.name, shape, chunk_shape)
            self._opened[name][part].write(values).result()
        except ValueError as error:  # TensorStore's, for a full disk as for all else.
            raise OSError(str(error).splitlines()[0]) from error

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
            "use_ocdbt": True,
            "use_zarr3": False,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self._folder / METADATA_FILE).write_text(json.dumps(metadata))

    def _open(
        self, name: str, dtype: str, shape: tuple[int, ...], chunk_shape: tuple[int, ...]
    ) -> ts.TensorStore:
        assert dtype in DTYPES
        spec = {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": {"driver": "file", "path": f"{self._folder}/"},
                "path": f"{name.replace('/', '.')}/",
            },
            "metadata": {
                "shape": list(shape),
                "chunks": list(chunk_shape),
                "compressor": None,
                "order": "C",
            },
            "dtype": dtype,
            "store_data_equal_to_fill_value": True,
        }
        return ts.open(spec, context=self._context, open=True, create=True).result()
