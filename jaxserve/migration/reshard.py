"""Reshard: a checkpoint with everything in it, optimizer state too, in another layout."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import jaxserve
from checkpoint.migrate.plan import Plan, PlannedArray, PlannedPart
from checkpoint.migrate.run import Migration, StepTarget
from checkpoint.store_source import StoreSource
from jaxserve.errors import ConfigError
from jaxserve.migration.source import SourceModel
from models.checkpoint_model import MODEL_FILE, model_json

_STACKED = re.compile(r"(?P<before>(.*/)?layers)/(?P<after>[^/]*[^/\d][^/]*(/.*)?)")
_SINGLE = re.compile(r"(?P<before>(.*/)?layers)/(?P<layer>\d+)/(?P<after>.+)")


def make_reshard(source: SourceModel, target: Path, *, layers: str, window_bytes: int) -> Migration:
    """Every array of the step, with layers stacked ("scanned") or one by one ("unscanned").

    Where on a mesh an array lies is decided when it is loaded: a step holds whole arrays,
    divided so that any part can be read alone.

    Raises:
        ConfigError: the source is no checkpoint of ours, or its layers do not fit together.
    """
    if source.model.lora is not None:
        raise ConfigError(
            "reshard keeps all that a checkpoint holds, and that of a run with [lora] holds no "
            "model; convert --to orbax merges its adapters into one"
        )
    if source.format != "orbax":
        raise ConfigError(
            f"{source.model.path} is a {source.format} model; reshard takes a model folder with "
            "checkpoints. Use convert --to orbax first"
        )
    assert isinstance(source.model.tensors, StoreSource)
    step = source.model.tensors.step
    split = _stacked if layers == "scanned" else _single
    arrays = list(split(source, list(step.arrays)))
    impls = {
        array.name: step.arrays[array.parts[0].source].key_impl
        for array in arrays
        if step.arrays[array.parts[0].source].key_impl is not None
    }
    return Migration(
        plan=Plan(
            tuple(arrays),
            {"to": "reshard", "layers": layers, "tool": jaxserve.__version__},
            (),
            window_bytes,
        ),
        source=source.parts,
        source_id=source.identity,
        source_record=source.record,
        target=target,
        form=StepTarget(step.step, dict(step.metadata), impls),
        carried={**source.carried.to_folder(), MODEL_FILE: model_json(source.config)},
        single_file=None,
        tool=f"jaxserve {jaxserve.__version__}",
    )


def _raw(source: SourceModel, name: str) -> PlannedArray:
    shape = source.parts.shape(name)
    dtype = source.parts.stored_dtype(name)
    return PlannedArray(name, shape, dtype, (PlannedPart(name, (), shape),))


def _single(source: SourceModel, names: list[str]) -> Iterator[PlannedArray]:
    """One array a layer."""
    num_layers = source.config.num_layers
    for name in names:
        match = _STACKED.fullmatch(name)
        shape = source.parts.shape(name)
        if match is None or shape[:1] != (num_layers,):
            yield _raw(source, name)
            continue
        dtype = source.parts.stored_dtype(name)
        for layer in range(num_layers):
            part = PlannedPart(name, (layer,), shape[1:])
            yield PlannedArray(
                f"{match['before']}/{layer}/{match['after']}", shape[1:], dtype, (part,)
            )


def _stacked(source: SourceModel, names: list[str]) -> Iterator[PlannedArray]:
    """Layers of one name in one array, in the place of the first of them."""
    groups: dict[tuple[str, str], dict[int, str]] = defaultdict(dict)
    order: list[tuple[str, str] | str] = []
    for name in names:
        match = _SINGLE.fullmatch(name)
        if match is None:
            order.append(name)
            continue
        key = (match["before"], match["after"])
        if key not in groups:
            order.append(key)
        groups[key][int(match["layer"])] = name
    for entry in order:
        if isinstance(entry, str):
            yield _raw(source, entry)
        else:
            yield _stack(source, entry, groups[entry])


def _stack(source: SourceModel, key: tuple[str, str], layers: dict[int, str]) -> PlannedArray:
    name = f"{key[0]}/{key[1]}"
    parts = [layers.get(layer) for layer in range(source.config.num_layers)]
    found = {
        (source.parts.shape(part), source.parts.stored_dtype(part))
        for part in parts
        if part is not None
    }
    if None in parts or len(found) != 1 or len(layers) != len(parts):
        raise ConfigError(
            f"{name}: its layers {sorted(layers)} are not {source.config.num_layers} arrays of "
            "one shape and dtype, so they cannot be stacked; use --layers unscanned"
        )
    ((shape, dtype),) = found
    planned = tuple(PlannedPart(part, (), shape) for part in parts if part is not None)
    return PlannedArray(name, (len(parts), *shape), dtype, planned)
