"""The planned arrays of a target: every leaf of the parameters through the target's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from checkpoint.migrate.plan import LowRank, PlannedArray, PlannedPart
from checkpoint.name_table import NameTable, TensorRule, Transform
from checkpoint.store.tree import DTYPES
from checkpoint.store_source import PARAMS
from jaxserve.migration.source import PieceKey, SourceModel, transform_of_one
from models.own_names import SCANNED, UNSCANNED, own_name_table

Updates = Mapping[PieceKey, LowRank]
"""Updates to merge."""
MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """One target array: its name and the pieces that it is made of."""

    name: str
    pieces: tuple[PieceKey, ...]
    to_file: Transform
    """Of each piece."""
    stacked_shape: tuple[int, ...]
    """The axes that count the pieces; none for a single one."""


def file_arrays(source: SourceModel, table: NameTable) -> list[Wanted]:
    """One array a tensor, in the table's order, layer by layer."""
    single = [rule for rule in table.rules if not rule.is_stacked]
    layered = [list(_wanted(source, rule)) for rule in table.rules if rule.is_stacked]
    wanted = [each for rule in single if rule.path == "embed" for each in _wanted(source, rule)]
    for layer in range(source.config.num_layers):
        for arrays in layered:
            num_each = len(arrays) // source.config.num_layers
            wanted += arrays[layer * num_each : (layer + 1) * num_each]
    return wanted + [
        each for rule in single if rule.path != "embed" for each in _wanted(source, rule)
    ]


def step_arrays(source: SourceModel, layers: str) -> list[Wanted]:
    """The arrays of a step below `params/`."""
    convention = SCANNED if layers == "scanned" else UNSCANNED
    return [
        replace(wanted, name=_array(wanted.name))
        for rule in own_name_table(source.config, convention).rules
        for wanted in _wanted(source, rule)
    ]


def _wanted(source: SourceModel, rule: TensorRule) -> Iterator[Wanted]:
    """The tensors of a rule, in order."""
    shape, num_axes = source.leaf_shapes[rule.path], source.stacked_axes[rule.path]
    to_file = transform_of_one(rule, num_axes)
    for name, place in rule.parts(shape):
        stacked = shape[len(place) : num_axes]
        pieces = tuple((rule.path, (*place, *rest)) for rest in np.ndindex(*stacked))
        yield Wanted(name, pieces, to_file, stacked)


def planned(
    source: SourceModel, wanted: Wanted, dtype: str | None, updates: Updates
) -> PlannedArray:
    """The array with its parts.

    Args:
        source: where the pieces are.
        wanted: what is asked for.
        dtype: None keeps the source's.
        updates: low-rank updates to merge.
    """
    parts = []
    dtypes = set()
    for key in wanted.pieces:
        piece = source.pieces[key]
        leaf_shape = source.leaf_shapes[key[0]][len(key[1]) :]
        dtypes.add(kept_dtype(source, piece.array))
        parts.append(
            PlannedPart(
                source=piece.array,
                index=piece.index,
                shape=wanted.to_file.file_shape(leaf_shape),
                to_leaf=piece.transform,
                to_file=wanted.to_file,
                low_rank=updates.get(key),
            )
        )
    shape = (*wanted.stacked_shape, *parts[0].shape)
    # bfloat16 and float16 layers beside each other: only float32 holds both.
    kept = dtypes.pop() if len(dtypes) == 1 else "float32"
    return PlannedArray(wanted.name, shape, dtype or kept, tuple(parts))


def raw_array(source: SourceModel, name: str, array: str) -> PlannedArray:
    """An array as it is."""
    shape = source.parts.shape(array)
    part = PlannedPart(array, (), shape)
    return PlannedArray(name, shape, source.parts.stored_dtype(array), (part,))


def kept_dtype(source: SourceModel, array: str) -> str:
    """The dtype that loses nothing: the array's own, float32 for quantised ones."""
    stored = source.parts.stored_dtype(array)
    return stored if stored in DTYPES else "float32"


def problems(source: SourceModel) -> list[str]:
    """What keeps the source from being the model of its config; one line each."""
    found = [*_problems(source)]
    if len(found) > MAX_PROBLEMS:
        found = [*found[:MAX_PROBLEMS], f"... and {len(found) - MAX_PROBLEMS} more"]
    return found


def _problems(source: SourceModel) -> Iterator[str]:
    tensors = source.model.tensors
    table = source.model.name_table
    present = set(tensors.names())
    expected = {
        name: rule for rule in table.rules for name, _ in rule.parts(source.leaf_shapes[rule.path])
    }
    for name in sorted(expected.keys() - present):
        yield f"missing: {name}"
    for name in sorted(present - expected.keys() - table.copies.keys()):
        if not table.is_ignored(name):
            yield f"unexpected: {name}"
    for name in sorted(expected.keys() & present):
        rule, leaf_shape = expected[name], source.leaf_shapes[expected[name].path]
        shape = rule.transform.file_shape(leaf_shape[rule.num_stacked_axes :])
        info = tensors.info(name)
        if info.shape != shape:
            yield f"wrong shape: {name} is {info.shape}, the config needs {shape}"
        if info.dtype.startswith(("int", "uint", "bool", "complex")):
            yield f"wrong dtype: {name} is {info.dtype}, not a floating-point type"
    for copy, original in table.copies.items():
        if {copy, original} <= present and not _same_values(source, copy, original):
            yield f"not tied: {copy} differs from {original}, yet the config ties them"


def _same_values(source: SourceModel, first: str, second: str) -> bool:
    parts, shape = source.parts, source.parts.shape(first)
    if parts.shape(second) != shape:
        return False
    step = max(1, (8 << 20) // max(1, parts.dtype(first).itemsize * shape[-1])) if shape else 1
    rest = tuple(slice(0, size) for size in shape[1:])
    for start in range(0, shape[0], step):
        index = (slice(start, min(start + step, shape[0])), *rest)
        if (parts.read_part(first, index) != parts.read_part(second, index)).any():
            return False
    return True


def _array(name: str) -> str:
    return f"{PARAMS}/{name.replace('.', '/')}"
