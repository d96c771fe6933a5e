"""The shards that a model came in, so that they can be written again byte for byte."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from checkpoint.errors import FormatError
from checkpoint.formats.safetensors import DTYPES, LENGTH_BYTES
from checkpoint.formats.safetensors_writer import ShardTensor, make_header
from checkpoint.migrate.plan import PlannedArray
from jaxserve.migration.carried import Carried


@dataclass(frozen=True)
class Shards:
    """Shards by file name, and all arrays in the order in which they lie."""

    tensors: Mapping[str, list[ShardTensor]]
    headers: Mapping[str, bytes]
    arrays: tuple[PlannedArray, ...]


def original_shards(
    carried: Carried,
    arrays: Mapping[str, PlannedArray],
    needed: Collection[str],
) -> Shards | None:
    """The shards of the source's headers, filled with `arrays`.

    Args:
        carried: with the headers.
        arrays: all that can be written, by name.
        needed: names without which the model is not whole.

    Returns:
        None if there are no headers, or if they are not of these arrays. A header is taken
        over as it is when all its dtypes are those of `arrays`, and made anew otherwise.

    Raises:
        FormatError: the headers are damaged.
    """
    try:
        return _original_shards(carried, arrays, needed)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"a kept shard header is damaged: {error!r}") from error


def _original_shards(
    carried: Carried, arrays: Mapping[str, PlannedArray], needed: Collection[str]
) -> Shards | None:
    tensors: dict[str, list[ShardTensor]] = {}
    headers: dict[str, bytes] = {}
    ordered: list[PlannedArray] = []
    for name, raw in sorted(carried.headers.items()):
        fields = json.loads(raw)
        metadata = fields.pop("__metadata__", {})
        if any(
            tensor not in arrays or list(arrays[tensor].shape) != entry["shape"]
            for tensor, entry in fields.items()
        ):
            return None
        entries = sorted(fields.items(), key=lambda item: item[1]["data_offsets"])
        mine = [arrays[tensor] for tensor, _ in entries]
        shard = [
            ShardTensor(array.name, array.dtype, array.shape, array.num_bytes) for array in mine
        ]
        is_same = all(
            DTYPES[entry["dtype"]].name == array.dtype
            for (_, entry), array in zip(entries, mine, strict=True)
        )
        tensors[name] = shard
        headers[name] = _with_length(raw) if is_same else make_header(shard, metadata)
        ordered += mine
    names = [array.name for array in ordered]
    if not names or len(set(names)) != len(names) or not set(needed) <= set(names):
        return None
    return Shards(tensors, headers, tuple(ordered))


def _with_length(header: bytes) -> bytes:
    return len(header).to_bytes(LENGTH_BYTES, "little") + header
