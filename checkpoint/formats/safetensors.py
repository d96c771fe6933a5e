"""SafetensorsFolder: the tensors of a Hugging Face folder, memory-mapped.

A file is an 8-byte little-endian header length, a JSON header and the tensors' bytes. The
header is checked whole before any tensor is read, so that a damaged or hostile file is an
error that says what is wrong, never a crash or a wrong read.
"""

from __future__ import annotations

import json
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from checkpoint.formats.location import TensorLocation
from checkpoint.tensor_source import TensorInfo

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
MAX_TENSORS = 250_000
"""In a file or a folder; the largest public models have some 100 000 in all their shards."""
MAX_RANK = 16
LENGTH_BYTES = 8

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}


@dataclass(frozen=True, slots=True)
class _Entry:
    info: TensorInfo
    dtype: np.dtype[Any]
    begin: int
    """Offset in the file, in bytes."""
    end: int


class SafetensorsFile:
    """One `.safetensors` file; a TensorSource.

    Raises:
        FormatError: the file breaks a rule of the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            self._size = file.seek(0, 2)
            if self._size < LENGTH_BYTES:
                raise FormatError(f"{path.name}: too short to be a safetensors file")
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._entries = self._read_entries()

    def names(self) -> Sequence[str]:
        """Tensor names in the header's order."""
        return tuple(self._entries)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of `name`."""
        return self._entries[name].info

    def read(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of the file."""
        entry = self._entries[name]
        count = (entry.end - entry.begin) // entry.dtype.itemsize
        values = np.frombuffer(self._map, entry.dtype, count, entry.begin)
        return values.reshape(entry.info.shape)

    def location(self, name: str) -> TensorLocation:
        """Where the bytes of `name` lie."""
        entry = self._entries[name]
        return TensorLocation(
            *(self.path, entry.begin, entry.end - entry.begin, entry.info.shape, entry.dtype)
        )

    @property
    def header(self) -> bytes:
        """The JSON header as it is in the file, with its padding."""
        length = int.from_bytes(self._map[:LENGTH_BYTES], "little")
        return self._map[LENGTH_BYTES : LENGTH_BYTES + length]

    def _read_entries(self) -> dict[str, _Entry]:
        header, data_begin = self._read_header()
        entries: dict[str, _Entry] = {}
        for name, fields in header.items():
            if name == "__metadata__":
                continue
            try:
                entries[name] = _entry(fields, data_begin)
            except FormatError as error:
                raise FormatError(f"{self.path.name}: tensor {name!r}: {error}") from error
        self._check_layout(entries, data_begin)
        return entries

    def _read_header(self) -> tuple[dict[str, Any], int]:
        length = int.from_bytes(self._map[:LENGTH_BYTES], "little")
        data_begin = LENGTH_BYTES + length
        if length > MAX_HEADER_BYTES or data_begin > self._size:
            raise FormatError(
                f"{self.path.name}: its header claims {length} bytes, but the file has "
                f"{self._size} and the limit is {MAX_HEADER_BYTES}; is the download whole?"
            )
        encoded = self._map[LENGTH_BYTES:data_begin]
        if encoded.count(b"{") > MAX_TENSORS + 2:  # Each has an object: refused before parsing.
            raise FormatError(f"{self.path.name}: more than {MAX_TENSORS} tensors")
        try:
            text = encoded.decode("utf-8")
            header = json.loads(text, object_pairs_hook=_unique_keys)
        except FormatError as error:
            raise FormatError(f"{self.path.name}: {error}") from error
        except (ValueError, RecursionError) as error:
            raise FormatError(f"{self.path.name}: the header is not valid JSON") from error
        if not isinstance(header, dict):
            raise FormatError(f"{self.path.name}: the header is not a JSON object")
        return header, data_begin

    def _check_layout(self, entries: Mapping[str, _Entry], data_begin: int) -> None:
        """The tensors must fill the rest of the file: no overlap, no hole, no tail."""
        reached = data_begin
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)):
            if entry.begin != reached:
                problem = "overlaps another" if entry.begin < reached else "leaves a hole before it"
                raise FormatError(f"{self.path.name}: tensor {name!r} {problem}")
            reached = entry.end
        if reached != self._size:
            raise FormatError(
                f"{self.path.name}: the tensors end at byte {reached}, the file at "
                f"{self._size}; is the download whole?"
            )


class SafetensorsFolder:
    """All tensors of a folder: `model.safetensors`, or shards named by its index.

    Raises:
        FormatError: no safetensors file, an index that does not agree with its shards, a
            shard name that is not a plain file name inside the folder, or a broken file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if (path / INDEX_FILE).is_file():
            self._files = self._open_shards(_read_index(path / INDEX_FILE))
        elif (path / SINGLE_FILE).is_file():
            file = SafetensorsFile(inside_folder(path, SINGLE_FILE))
            self._files = dict.fromkeys(file.names(), file)
        else:
            raise FormatError(_nothing_to_read(path))

    def names(self) -> Sequence[str]:
        """Tensor names of all shards."""
        return tuple(self._files)

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of `name`."""
        return self._files[name].info(name)

    def read(self, name: str) -> npt.NDArray[Any]:
        """A read-only view of the shard that holds `name`."""
        return self._files[name].read(name)

    def location(self, name: str) -> TensorLocation:
        """Where the bytes of `name` lie."""
        return self._files[name].location(name)

    @property
    def files(self) -> Sequence[SafetensorsFile]:
        """The shards, by file name."""
        by_name = {file.path.name: file for file in self._files.values()}
        return [by_name[name] for name in sorted(by_name)]

    def _open_shards(self, weight_map: Mapping[str, str]) -> dict[str, SafetensorsFile]:
        shards = {
            shard: SafetensorsFile(inside_folder(self.path, shard))
            for shard in sorted(set(weight_map.values()))
        }
        held = {(name, shard) for shard, file in shards.items() for name in file.names()}
        differing = held ^ set(weight_map.items())
        if differing:
            name, shard = min(differing)
            claim = "lacks it" if (name, shard) not in held else "holds it unannounced"
            raise FormatError(f"{INDEX_FILE}: tensor {name!r}: the file {shard!r} {claim}")
        return {name: shards[shard] for name, shard in weight_map.items()}


def _entry(fields: Any, data_begin: int) -> _Entry:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise FormatError("its entry must hold dtype, shape and data_offsets")
    dtype = DTYPES.get(str(fields["dtype"]))
    if dtype is None:
        raise FormatError(
            f"dtype {fields['dtype']!r} is not supported; use weights in F32, F16 or BF16"
        )
    shape, offsets = fields["shape"], fields["data_offsets"]
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise FormatError(f"shape {shape!r} is not a list of sizes")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise FormatError(f"data_offsets {offsets!r} is not a begin and an end")
    num_bytes = dtype.itemsize
    for size in shape:
        num_bytes *= size
    begin, end = offsets
    if end - begin != num_bytes:
        raise FormatError(
            f"{fields['dtype']} of shape {shape} is {num_bytes} bytes, not {end - begin}"
        )
    return _Entry(TensorInfo(tuple(shape), dtype.name), dtype, data_begin + begin, data_begin + end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise FormatError("a key appears twice in one JSON object")
    return keys


def _read_index(path: Path) -> dict[str, str]:
    if path.stat().st_size > MAX_HEADER_BYTES:
        raise FormatError(f"{path.name} is larger than {MAX_HEADER_BYTES} bytes")
    try:
        index = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except FormatError as error:
        raise FormatError(f"{path.name}: {error}") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name} is not valid JSON") from error
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(shard, str) for shard in weight_map.values())
    ):
        raise FormatError(f"{path.name}: weight_map must map tensor names to file names")
    if len(weight_map) > MAX_TENSORS:
        raise FormatError(f"{path.name}: more than {MAX_TENSORS} tensors")
    return weight_map


def inside_folder(folder: Path, name: str) -> Path:
    """The file `name` of `folder`, which may not lead out of it, by a link either.

    Raises:
        FormatError: it is not a plain name, not a file, or a link that leads out.
    """
    is_plain = name not in ("", ".", "..") and not set(name) & set("/\\\0:")
    if not is_plain or PurePosixPath(name).name != name:
        raise FormatError(f"shard name {name!r} must be a plain file name inside the folder")
    path = folder / name
    if not path.is_file():
        raise FormatError(f"{name} is missing from {folder}; is the download whole?")
    roots = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        # The Hugging Face cache: a snapshot's files are links to the model's blobs.
        roots.append(folder.resolve().parent.parent / "blobs")
    if not any(path.resolve().is_relative_to(root) for root in roots):
        raise FormatError(f"{name} is a link that leads out of {folder}; copy the file there")
    return path


def _nothing_to_read(folder: Path) -> str:
    pickled = [path.name for path in folder.glob("*") if path.suffix in (".bin", ".pt", ".pth")]
    if pickled:
        return (
            f"{folder} holds {min(pickled)}, a pickle, which can run code and is never read; use "
            "a version of the model with *.safetensors files, or convert it with "
            "`save_pretrained(..., safe_serialization=True)`"
        )
    return f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}"
