"""Conversions: open, plan, check, migrate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoint.formats.gguf_q8_0 import program as q8_0_program
from checkpoint.migrate.manifest import MigrationManifest
from checkpoint.migrate.plan import NUM_BEING_WRITTEN, max_in_flight
from checkpoint.migrate.run import Limits, Migration, OnProgress, migrate, peak_memory_bytes
from checkpoint.migrate.workspace import Workspace, workspace_path
from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.migration.arrays import problems
from jaxserve.migration.lora import low_rank_updates
from jaxserve.migration.request import (
    LAYERS,
    MAX_WINDOW_BYTES,
    MIN_WINDOW_BYTES,
    ConversionRequest,
)
from jaxserve.migration.reshard import make_reshard
from jaxserve.migration.source import SourceModel, open_source
from jaxserve.migration.targets import make_migration
from models.lora import Lora
from models.lora_peft import load_peft

if TYPE_CHECKING:
    from collections.abc import Iterator

WINDOWS_A_BUDGET = 12
"""A window is at most this share of the memory budget: several are in memory at once, and the
libraries that write take their own."""


class UnfitSource(JaxserveError):
    """The source's tensors are not those of its config."""


@dataclass(frozen=True)
class Conversion:
    """A planned conversion: what will be done, before anything is."""

    source: SourceModel
    migration: Migration
    max_batch_bytes: int
    num_in_flight: int

    @property
    def peak_bytes(self) -> int:
        """Most memory that the process will hold, as planned."""
        num_batches = self.num_in_flight + NUM_BEING_WRITTEN
        return peak_memory_bytes() + self.max_batch_bytes * num_batches

    def run(self, limits: Limits, progress: OnProgress) -> MigrationManifest:
        """Do it. Raises as `checkpoint.migrate.run.migrate`."""
        return migrate(self.migration, limits, progress)


@contextmanager
def plan_conversion(
    path: Path,
    request: ConversionRequest,
    *,
    num_workers: int,
    memory_bytes: int | None,
    check: Callable[[SourceModel, Path], None] | None = None,
) -> Iterator[Conversion]:
    """Open the source and plan.

    Args:
        path: a model in any format; `DIR@STEP` names a checkpoint.
        request: what is asked for.
        num_workers: threads that read.
        memory_bytes: of the whole process, None for no limit.
        check: called with the source and the finished target before it is published.

    Raises:
        UnfitSource: tensors are missing, unexpected or mis-shaped; the message lists them.
        ConfigError, FormatError, StoreError, MigrationError: see `open_source`,
            `make_migration` and `max_in_flight`.
    """
    _check_apart(path, request.target)
    if memory_bytes is not None and request.quantization == "Q8_0":
        q8_0_program()  # What it takes is then part of what is taken.
    request = replace(request, window_bytes=_window_bytes(memory_bytes, request.target))
    with _opened(path, request.config) as source:
        _check_apart(source.model.path, request.target)  # Another one, if `path` has adapters.
        migration = make_migration(source, request, low_rank_updates(_adapters(source, request)))
        if check is not None:
            migration = replace(migration, check=lambda made: check(source, made))
        yield _planned(source, migration, num_workers, memory_bytes)


def _adapters(source: SourceModel, request: ConversionRequest) -> Lora | None:
    """What is merged: the source's own adapters, or those of the request."""
    if request.lora is None:
        return source.model.lora
    if source.model.lora is not None:
        raise ConfigError(
            f"--lora {request.lora}: the source is a run of adapters itself, which are merged. "
            "Convert it without --lora, then the result with it"
        )
    return load_peft(request.lora, source.config)


@contextmanager
def plan_reshard(
    path: Path, target: Path, *, layers: str, num_workers: int, memory_bytes: int | None
) -> Iterator[Conversion]:
    """Open a checkpoint of ours and plan to write all it holds anew; as `plan_conversion`."""
    _check_apart(path, target)
    if layers not in LAYERS:
        raise ConfigError(f"--layers {layers!r} is not one of {', '.join(LAYERS)}")
    with _opened(path) as source:
        window_bytes = _window_bytes(memory_bytes, target)
        migration = make_reshard(source, target, layers=layers, window_bytes=window_bytes)
        yield _planned(source, migration, num_workers, memory_bytes)


def _window_bytes(memory_bytes: int | None, target: Path) -> int:
    """That of an unfinished `target` if the budget still allows it: what is free differs a little
    from start to start, and the chunks of what is there follow from it."""
    window = MAX_WINDOW_BYTES
    if memory_bytes is not None:
        taken = peak_memory_bytes()
        window = min(window, (memory_bytes - taken) // WINDOWS_A_BUDGET)
        if window < MIN_WINDOW_BYTES:
            needed = taken + WINDOWS_A_BUDGET * MIN_WINDOW_BYTES
            raise ConfigError(
                f"--memory-budget: the program alone takes {taken / 1e6:.0f} MB; give at least "
                f"{needed / 1e6:.0f} MB"
            )
    recorded = Workspace.recorded_window_bytes(workspace_path(target)) or 0
    return recorded if MIN_WINDOW_BYTES <= recorded <= 1.25 * window else window


@contextmanager
def _opened(path: Path, config: Path | None = None) -> Iterator[SourceModel]:
    source = open_source(path, config=config)
    try:
        found = problems(source)
        if found:
            raise UnfitSource(
                "the tensors do not fit the model's config; is the download whole, and is it this "
                "model's config?\n  " + "\n  ".join(found)
            )
        yield source
    finally:
        source.close()


def _planned(
    source: SourceModel, migration: Migration, num_workers: int, memory_bytes: int | None
) -> Conversion:
    in_flight = num_workers + 2
    if memory_bytes is not None:
        free = memory_bytes - peak_memory_bytes()
        in_flight = max_in_flight(migration.plan, migration.source, num_workers, free)
    largest = migration.plan.max_batch_bytes(migration.source)
    return Conversion(source, migration, largest, in_flight)


def describe(conversion: Conversion) -> dict[str, Any]:
    """The plan as JSON values, for `--dry-run` and `--json`."""
    plan = conversion.migration.plan
    return {
        "source": dict(conversion.source.record),
        "target": str(conversion.migration.target),
        "settings": dict(plan.settings),
        "plan_sha256": plan.digest,
        "num_arrays": len(plan.arrays),
        "num_bytes": plan.num_bytes,
        "window_bytes": plan.window_bytes,
        "peak_memory_bytes": conversion.peak_bytes,
        "notes": list(plan.notes),
        "files": sorted(conversion.migration.carried),
        "arrays": [
            {
                "name": array.name,
                "dtype": array.dtype,
                "shape": list(array.shape),
                "num_bytes": array.num_bytes,
                "from": [part.source for part in array.parts],
                "transforms": _transforms(conversion, index),
            }
            for index, array in enumerate(plan.arrays)
        ],
    }


def _transforms(conversion: Conversion, index: int) -> list[str]:
    array = conversion.migration.plan.arrays[index]
    part = array.parts[0]
    steps = [
        f"{name} ({way})"
        for name, way in ((part.to_leaf.name, "to ours"), (part.to_file.name, "to the file"))
        if name != "identity"
    ]
    if part.low_rank is not None:
        steps.append("merge adapter")
    stored = conversion.migration.source.stored_dtype(part.source)
    if stored != array.dtype:
        steps.append(f"{stored} -> {array.dtype}")
    if array.stacked_shape:
        steps.append(f"stack {' x '.join(map(str, array.stacked_shape))}")
    elif part.index:
        steps.append("unstack")
    return steps


def _check_apart(source: Path, target: Path) -> None:
    """The target must not be the source or lie in it: it would be read while it is written."""
    one, other = source.absolute(), target.absolute()
    if target.exists() and source.exists() and one.resolve() == other.resolve():
        raise ConfigError(f"{target} is the source itself; give another target")
    if one.resolve() in other.resolve().parents:
        raise ConfigError(f"{target} lies inside the source; give a target beside it")
