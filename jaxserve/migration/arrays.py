"""The planned arrays of a target: every leaf of the parameters through the target's names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from checkpoint.migrate.plan import LowRank, PlannedArray, PlannedPart
from checkpoint.name_table import IDENTITY, NameTable, TensorRule, Transform
from checkpoint.store.tree import DTYPES
from checkpoint.store_source import PARAMS
from jaxserve.migration.source import LAYERS, SourceModel, name_in_layer
from models.own_names import SCANNED, UNSCANNED, own_name_table

Updates = Mapping[tuple[str, int | None], LowRank]
"""Updates to merge, by path and layer."""
MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Wanted:
    """One target array: its name and the pieces that it is made of."""

    name: str
    pieces: tuple[tuple[str, int | None], ...]
    to_file: Transform
    is_stacked: bool


def file_arrays(source: SourceModel, table: NameTable) -> list[Wanted]:
    """One array a tensor, in the table's order, layer by layer."""
    single = [rule for rule in table.rules if not rule.is_stacked]
    layered = [rule for rule in table.rules if rule.is_stacked]
    first = [rule for rule in single if rule.path == "embed"]
    last = [rule for rule in single if rule.path != "embed"]
    wanted = [_single(rule) for rule in first]
    for layer in range(source.config.num_layers):
        wanted += [
            Wanted(
                name_in_layer(rule, layer), ((rule.path, layer),), rule.transform, is_stacked=False
            )
            for rule in layered
        ]
    return wanted + [_single(rule) for rule in last]


def step_arrays(source: SourceModel, layers: str) -> list[Wanted]:
    """The arrays of a step below `params/`."""
    convention = SCANNED if layers == "scanned" else UNSCANNED
    wanted = []
    for rule in own_name_table(source.config, convention).rules:
        if rule.is_stacked:
            wanted += [
                Wanted(_array(name_in_layer(rule, layer)), ((rule.path, layer),), IDENTITY, False)
                for layer in range(source.config.num_layers)
            ]
        elif rule.path.startswith(LAYERS):
            pieces = tuple((rule.path, layer) for layer in range(source.config.num_layers))
            wanted.append(Wanted(_array(rule.name), pieces, IDENTITY, is_stacked=True))
        else:
            wanted.append(Wanted(_array(rule.name), ((rule.path, None),), IDENTITY, False))
    return wanted


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
        leaf_shape = source.leaf_shapes[key[0]]
        if key[1] is not None:
            leaf_shape = leaf_shape[1:]
        dtypes.add(kept_dtype(source, piece.array))
        parts.append(
            PlannedPart(
                source=piece.array,
                layer=piece.index,
                shape=wanted.to_file.file_shape(leaf_shape),
                to_leaf=piece.transform,
                to_file=wanted.to_file,
                low_rank=updates.get(key),
            )
        )
    shape = (len(parts), *parts[0].shape) if wanted.is_stacked else parts[0].shape
    # bfloat16 and float16 layers beside each other: only float32 holds both.
    kept = dtypes.pop() if len(dtypes) == 1 else "float32"
    return PlannedArray(wanted.name, shape, dtype or kept, tuple(parts), wanted.is_stacked)


def raw_array(source: SourceModel, name: str, array: str) -> PlannedArray:
    """An array as it is."""
    shape = source.parts.shape(array)
    part = PlannedPart(array, None, shape)
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
        name: key
        for rule in table.rules
        for name, key in _names_and_keys(rule, source.config.num_layers)
    }
    for name in sorted(expected.keys() - present):
        yield f"missing: {name}"
    for name in sorted(present - expected.keys() - table.copies.keys()):
        if not table.is_ignored(name):
            yield f"unexpected: {name}"
    for name in sorted(expected.keys() & present):
        rule, leaf_shape = expected[name], source.leaf_shapes[expected[name].path]
        if rule.is_stacked:
            leaf_shape = leaf_shape[1:]
        shape = rule.transform.file_shape(leaf_shape)
        info = tensors.info(name)
        if info.shape != shape:
            yield f"wrong shape: {name} is {info.shape}, the config needs {shape}"
        if info.dtype.startswith(("int", "uint", "bool", "complex")):
            yield f"wrong dtype: {name} is {info.dtype}, not a floating-point type"
    for copy, original in table.copies.items():
        if {copy, original} <= present and not _same_values(source, copy, original):
            yield f"not tied: {copy} differs from {original}, yet the config ties them"


def _names_and_keys(rule: TensorRule, num_layers: int) -> Iterator[tuple[str, TensorRule]]:
    if rule.is_stacked:
        yield from ((name_in_layer(rule, layer), rule) for layer in range(num_layers))
    else:
        yield rule.name, rule


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


def _single(rule: TensorRule) -> Wanted:
    return Wanted(rule.name, ((rule.path, None),), rule.transform, is_stacked=False)


def _array(name: str) -> str:
    return f"{PARAMS}/{name.replace('.', '/')}"
