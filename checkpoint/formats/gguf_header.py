"""The GGUF header: what a file says about itself, believed only after checks.

Every count and offset is a Python int compared with the bytes that are really
there before anything is allocated for it, so a lying file costs no more memory
than an honest file of its size.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from checkpoint.errors import FormatError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
MAX_DIMS = 4
MAX_TENSORS = 250_000
MAX_ELEMENTS = 1 << 40
MAX_STRING_BYTES = 1 << 20
MAX_ARRAY_LENGTH = 1 << 24
"""Sixty times the largest vocabulary in use; keeps a sparse file from
claiming a terabyte of metadata."""

SUPPORTED_TYPES = frozenset(
    GGMLQuantizationType[name]
    for name in (
        *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
        *("Q4_K", "Q5_K", "Q6_K"),
    )
)

_SCALARS: Mapping[int, tuple[str, str]] = {
    GGUFValueType.UINT8: ("<B", "u1"),
    GGUFValueType.INT8: ("<b", "i1"),
    GGUFValueType.UINT16: ("<H", "<u2"),
    GGUFValueType.INT16: ("<h", "<i2"),
    GGUFValueType.UINT32: ("<I", "<u4"),
    GGUFValueType.INT32: ("<i", "<i4"),
    GGUFValueType.FLOAT32: ("<f", "<f4"),
    GGUFValueType.UINT64: ("<Q", "<u8"),
    GGUFValueType.INT64: ("<q", "<i8"),
    GGUFValueType.FLOAT64: ("<d", "<f8"),
    GGUFValueType.BOOL: ("<B", "u1"),
}
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
_SIZE = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies. `shape` is row-major, outermost axis first: the
    reverse of the order in the file."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    offset: int
    """Bytes from the start of the file."""
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: Mapping[str, Any]
    """Scalars are Python values, string arrays are lists of str, number
    arrays are NumPy arrays."""
    tensors: Mapping[str, TensorEntry]


def parse_header(buffer: memoryview) -> GgufHeader:
    """Reads and checks the header of a whole GGUF file.

    Raises FormatError that names the broken rule; nothing is read outside
    `buffer` and nothing is allocated beyond a small multiple of its length.
    """
    cursor = _Cursor(buffer)
    if bytes(cursor.take(4, "the magic number")) != MAGIC:
        raise FormatError('not a GGUF file: it does not start with "GGUF"')
    version = cursor.scalar("<I", "the version")
    if version not in VERSIONS:
        if version & 0xFFFF == 0:
            raise FormatError("big-endian GGUF is not supported; convert it to little-endian")
        raise FormatError(f"GGUF version {version} is not supported, only 2 and 3 are")
    num_tensors = cursor.count("<Q", _MIN_TENSOR_BYTES, "tensor count")
    if num_tensors > MAX_TENSORS:
        raise FormatError(f"GGUF claims {num_tensors} tensors, above the limit of {MAX_TENSORS}")
    num_keys = cursor.count("<Q", _MIN_KEY_BYTES, "metadata key count")
    metadata = _read_metadata(cursor, num_keys)
    alignment = _alignment(metadata)
    entries = [_read_tensor_entry(cursor) for _ in range(num_tensors)]
    data_start = -(-cursor.offset // alignment) * alignment
    tensors = _place_tensors(entries, data_start, alignment, len(buffer))
    return GgufHeader(MappingProxyType(metadata), MappingProxyType(tensors))


class _Cursor:
    """Reads forward through a buffer, never past its end."""

    def __init__(self, buffer: memoryview) -> None:
        self.buffer = buffer
        self.offset = 0

    @property
    def remaining(self) -> int:
        return len(self.buffer) - self.offset

    def take(self, num_bytes: int, what: str) -> memoryview:
        if num_bytes > self.remaining:
            raise FormatError(
                f"GGUF file is cut short: {what} needs {num_bytes} bytes at offset "
                f"{self.offset} and only {self.remaining} are left"
            )
        start = self.offset
        self.offset += num_bytes
        return self.buffer[start : self.offset]

    def scalar(self, code: str, what: str) -> Any:
        return struct.unpack(code, self.take(struct.calcsize(code), what))[0]

    def count(self, code: str, min_item_bytes: int, what: str) -> int:
        """A count of items that each take at least `min_item_bytes` of what follows."""
        value = int(self.scalar(code, what))
        if value * min_item_bytes > self.remaining:
            raise FormatError(
                f"GGUF {what} {value} cannot fit in the {self.remaining} bytes that follow"
            )
        return value

    def string(self, what: str) -> str:
        num_bytes = self.count("<Q", 1, f"length of {what}")
        if num_bytes > MAX_STRING_BYTES:
            raise FormatError(
                f"GGUF {what} is a string of {num_bytes} bytes, above the limit of "
                f"{MAX_STRING_BYTES}"
            )
        try:
            return str(self.take(num_bytes, what), "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"GGUF {what} is not valid UTF-8: {error.reason}") from None

    def strings(self, length: int, what: str) -> list[str]:
        """As `string`, so many times in less time: a tokenizer has a hundred thousand."""
        found: list[str] = []
        for _ in range(length):
            start = self.offset + _SIZE.size
            try:
                end = start + _SIZE.unpack_from(self.buffer, self.offset)[0]
                if end - start > MAX_STRING_BYTES or end > len(self.buffer):
                    raise ValueError
                found.append(str(self.buffer[start:end], "utf-8"))
            except (struct.error, ValueError):  # A UnicodeDecodeError is a ValueError.
                self.string(what)  # Raises, and says what is wrong.
                raise
            self.offset = end
        return found


def _read_metadata(cursor: _Cursor, num_keys: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {}
    for _ in range(num_keys):
        key = cursor.string("metadata key")
        if key in metadata:
            raise FormatError(f"GGUF metadata key {key!r} appears twice")
        metadata[key] = _read_value(cursor, int(cursor.scalar("<I", "value type")), key)
    return metadata


def _read_value(cursor: _Cursor, value_type: int, key: str) -> Any:
    if value_type == GGUFValueType.STRING:
        return cursor.string(f"value of {key!r}")
    if value_type == GGUFValueType.ARRAY:
        return _read_array(cursor, key)
    if value_type not in _SCALARS:
        raise FormatError(f"GGUF metadata {key!r} has the unknown value type {value_type}")
    value = cursor.scalar(_SCALARS[value_type][0], f"value of {key!r}")
    if value_type == GGUFValueType.BOOL:
        if value > 1:
            raise FormatError(f"GGUF metadata {key!r} is a boolean of value {value}")
        return bool(value)
    return value


def _read_array(cursor: _Cursor, key: str) -> Any:
    item_type = int(cursor.scalar("<I", f"item type of {key!r}"))
    if item_type == GGUFValueType.ARRAY:
        raise FormatError(f"GGUF metadata {key!r} is an array of arrays, which is not supported")
    if item_type != GGUFValueType.STRING and item_type not in _SCALARS:
        raise FormatError(f"GGUF metadata {key!r} has the unknown item type {item_type}")
    is_string = item_type == GGUFValueType.STRING
    item_bytes = 8 if is_string else np.dtype(_SCALARS[item_type][1]).itemsize
    length = cursor.count("<Q", item_bytes, f"length of array {key!r}")
    if length > MAX_ARRAY_LENGTH:
        raise FormatError(
            f"GGUF array {key!r} has {length} items, above the limit of {MAX_ARRAY_LENGTH}"
        )
    if is_string:
        return cursor.strings(length, key)
    data = np.frombuffer(cursor.take(length * item_bytes, key), _SCALARS[item_type][1]).copy()
    return data.astype(np.bool_) if item_type == GGUFValueType.BOOL else data


def _alignment(metadata: Mapping[str, Any]) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        not isinstance(alignment, int)
        or isinstance(alignment, bool)
        or not 0 < alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise FormatError(
            f"GGUF general.alignment must be a power of two up to {MAX_ALIGNMENT}, "
            f"not {str(alignment)[:40]}"
        )
    return alignment


def _read_tensor_entry(cursor: _Cursor) -> TensorEntry:
    """One tensor with `offset` still relative to the data section."""
    name = cursor.string("tensor name")
    num_dims = int(cursor.scalar("<I", f"dimension count of {name!r}"))
    if not 1 <= num_dims <= MAX_DIMS:
        raise FormatError(f"GGUF tensor {name!r} has {num_dims} dimensions, not 1 to {MAX_DIMS}")
    dims = [int(cursor.scalar("<Q", f"dimensions of {name!r}")) for _ in range(num_dims)]
    num_elements = prod(dims)
    if not 0 < num_elements <= MAX_ELEMENTS:
        raise FormatError(f"GGUF tensor {name!r} has the impossible dimensions {dims}")
    type_id = int(cursor.scalar("<I", f"type of {name!r}"))
    offset = int(cursor.scalar("<Q", f"offset of {name!r}"))
    kind = _tensor_type(name, type_id)
    block_size, block_bytes = GGML_QUANT_SIZES[kind]
    if dims[0] % block_size:
        raise FormatError(
            f"GGUF tensor {name!r} has rows of {dims[0]} elements, not a multiple of the "
            f"{block_size} of a {kind.name} block"
        )
    num_bytes = num_elements // block_size * block_bytes
    return TensorEntry(name, tuple(reversed(dims)), kind, offset, num_bytes)


def _tensor_type(name: str, type_id: int) -> GGMLQuantizationType:
    try:
        kind = GGMLQuantizationType(type_id)
    except ValueError:
        raise FormatError(f"GGUF tensor {name!r} has the unknown type number {type_id}") from None
    if kind not in SUPPORTED_TYPES:
        known = ", ".join(sorted(supported.name for supported in SUPPORTED_TYPES))
        raise FormatError(
            f"GGUF tensor {name!r} is stored as {kind.name}, which is not supported; "
            f"use a file in one of {known}"
        )
    return kind


def _place_tensors(
    entries: list[TensorEntry], data_start: int, alignment: int, file_bytes: int
) -> dict[str, TensorEntry]:
    """Makes offsets absolute and checks that tensors lie in the file, apart."""
    tensors: dict[str, TensorEntry] = {}
    for entry in entries:
        if entry.name in tensors:
            raise FormatError(f"GGUF tensor {entry.name!r} appears twice")
        if entry.offset % alignment:
            raise FormatError(
                f"GGUF tensor {entry.name!r} starts at {entry.offset}, off its alignment "
                f"of {alignment} bytes"
            )
        start = data_start + entry.offset
        if start + entry.num_bytes > file_bytes:
            raise FormatError(
                f"GGUF tensor {entry.name!r} ends at byte {start + entry.num_bytes} of a file "
                f"of {file_bytes}; the file may be cut short: fetch it again"
            )
        tensors[entry.name] = TensorEntry(
            entry.name, entry.shape, entry.type, start, entry.num_bytes
        )
    ordered = sorted(tensors.values(), key=lambda entry: entry.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.num_bytes > after.offset:
            raise FormatError(f"GGUF tensors {before.name!r} and {after.name!r} overlap")
    return tensors
