"""PlainStep: a checkpoint that Orbax wrote by itself, of which nothing vouches for the values."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoint.errors import FormatError
from checkpoint.store.array_files import METADATA_FILE
from checkpoint.store.errors import StoreUnreadable
from checkpoint.store.manifest import ArrayRecord, Manifest
from checkpoint.store.open_step import OpenStep
from checkpoint.store.orbax_io import ArrayReader
from checkpoint.store.tree import DTYPES, HostArray

MAX_METADATA_BYTES = 256 << 20
NOT_ARRAYS = ("None", "string")
"""Kinds of values in Orbax's metadata that are no arrays."""


def find_plain_step(folder: Path) -> Path | None:
    """Where in `folder` Orbax's arrays are: the folder itself, or the one item of it, as a
    CheckpointManager makes them. None if it is not of Orbax."""
    if not folder.is_dir():
        return None
    items = [path for path in sorted(folder.iterdir()) if path.is_dir() and not path.is_symlink()]
    found = [path for path in (folder, *items) if (path / METADATA_FILE).is_file()]
    return found[0] if found else None


class PlainStep(OpenStep):
    """An OpenStep without digests: `read` checks nothing.

    Args:
        folder: that holds Orbax's `_METADATA`.

    Raises:
        FormatError: the metadata or an array cannot be understood.
        StoreUnreadable: the system refuses to read.
    """

    def __init__(self, folder: Path) -> None:
        links = [path for path in folder.rglob("*") if path.is_symlink()]
        if links:
            raise FormatError(f"{links[0]} is a link, which is not followed; copy the file there")
        reader = ArrayReader(folder)
        arrays = {name: _record(reader, folder, name) for name in _names(folder)}
        super().__init__(folder, Manifest(0, arrays, {}, {}), None)
        self._reader = reader

    def read(self, name: str) -> HostArray:
        """All values of one array, as they are.

        Raises:
            FormatError: the files cannot be understood.
            StoreUnreadable: the system refuses to read.
        """
        try:
            return self._reader.read(name)
        except StoreUnreadable:
            raise
        except (ValueError, OSError) as error:
            raise FormatError(f"{self.folder}: array {name}: {error}") from error


def _names(folder: Path) -> list[str]:
    path = folder / METADATA_FILE
    if path.stat().st_size > MAX_METADATA_BYTES:
        raise FormatError(f"{path} is larger than {MAX_METADATA_BYTES >> 20} MiB")
    try:
        fields: Any = json.loads(path.read_bytes())
        if fields.get("use_zarr3"):
            raise FormatError(f"{folder} is stored as Zarr 3; save it with use_zarr3=False")
        names = []
        for entry in fields["tree_metadata"].values():
            keys = [str(key["key"]) for key in entry["key_metadata"]]
            if entry["value_metadata"]["value_type"] in NOT_ARRAYS:
                continue
            if not keys or any(not key or "/" in key or "." in key for key in keys):
                raise FormatError(f"{path} has a name that is not supported: {keys}")
            names.append("/".join(keys))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise FormatError(f"{path} is not what Orbax writes: {error!r}") from error
    return names


def _record(reader: ArrayReader, folder: Path, name: str) -> ArrayRecord:
    try:
        shape, dtype = reader.shape_and_dtype(name)
    except StoreUnreadable:
        raise
    except (ValueError, OSError) as error:
        raise FormatError(f"{folder}: array {name}: {error}") from error
    if dtype not in DTYPES:
        raise FormatError(f"{folder}: array {name} has the dtype {dtype}, which is not supported")
    return ArrayRecord(shape, dtype, "", None)
