"""Headers of safetensors files: what comes before the tensors' bytes, and the shards' index."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from checkpoint.errors import FormatError
from checkpoint.formats.safetensors import DTYPES, LENGTH_BYTES, MAX_HEADER_BYTES

NAMES = {dtype.name: name for name, dtype in DTYPES.items()}
"""NumPy's name of a dtype to the format's."""
HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class ShardTensor:
    """One tensor of a shard."""

    name: str
    dtype: str
    """NumPy's name."""
    shape: tuple[int, ...]
    num_bytes: int


def make_header(tensors: Sequence[ShardTensor], metadata: Mapping[str, str]) -> bytes:
    """The length and the JSON header of a file that holds `tensors` in this order.

    Raises:
        FormatError: a dtype that the format has no name for, or a header that is too long.
    """
    fields: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in tensors:
        if tensor.dtype not in NAMES:
            raise FormatError(
                f"safetensors: {tensor.name} is {tensor.dtype}, which cannot be written; choose "
                "--dtype float32, bfloat16 or float16"
            )
        fields[tensor.name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.num_bytes],
        }
        offset += tensor.num_bytes
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % HEADER_ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        raise FormatError(f"safetensors: a header of {len(text)} bytes; use more shards")
    return len(text).to_bytes(LENGTH_BYTES, "little") + text


def make_index(weight_map: Mapping[str, str], total_bytes: int) -> str:
    """The text of `model.safetensors.index.json`."""
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return json.dumps(index, indent=2) + "\n"


def shard_names(num_shards: int) -> list[str]:
    """File names as `transformers` gives them."""
    if num_shards == 1:
        return ["model.safetensors"]
    return [f"model-{i:05d}-of-{num_shards:05d}.safetensors" for i in range(1, num_shards + 1)]


def split_shards(tensors: Sequence[ShardTensor], max_shard_bytes: int) -> list[list[ShardTensor]]:
    """`tensors` in order, in shards of at most `max_shard_bytes` or a single tensor."""
    shards: list[list[ShardTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards
