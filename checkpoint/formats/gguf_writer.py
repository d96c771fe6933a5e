"""The header of a GGUF file, written by the `gguf` package, and where its tensors lie."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, GGUFValueType

from checkpoint.formats.gguf_header import DEFAULT_ALIGNMENT

ARCHITECTURE = "general.architecture"


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """One tensor. `shape` is row-major."""

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GgufValue:
    """A metadata value with the type that the format shall give it."""

    kind: GGUFValueType
    value: Any
    """A number, bool or text, or a list of them: then `kind` is of the items."""
    is_array: bool = False


def make_header(
    metadata: Mapping[str, GgufValue], tensors: Sequence[GgufTensor]
) -> tuple[bytes, list[int]]:
    """The bytes before the first tensor, and each tensor's offset from the file's start.

    Args:
        metadata: with `general.architecture`.
        tensors: in the order in which they lie.
    """
    with tempfile.TemporaryDirectory(prefix="gguf-header-") as folder:
        path = Path(folder) / "header"
        writer = GGUFWriter(path, str(metadata[ARCHITECTURE].value))
        try:
            for key, value in metadata.items():
                if key == ARCHITECTURE:  # The writer has put it there.
                    continue
                if value.is_array:
                    writer.add_key_value(key, value.value, GGUFValueType.ARRAY, value.kind)
                else:
                    writer.add_key_value(key, value.value, value.kind)
            for tensor in tensors:
                writer.add_tensor_info(
                    *(tensor.name, tensor.shape, np.dtype(np.float32), tensor.num_bytes),
                    raw_dtype=tensor.kind,
                )
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        header = path.read_bytes()
    header += bytes(-len(header) % DEFAULT_ALIGNMENT)
    offsets = []
    offset = len(header)
    for tensor in tensors:
        offsets.append(offset)
        offset += -(-tensor.num_bytes // DEFAULT_ALIGNMENT) * DEFAULT_ALIGNMENT
    return header, offsets
