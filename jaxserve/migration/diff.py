"""Diff: where two models differ, array by array, whatever formats they are in."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpoint.migrate.compute import compute_window
from checkpoint.migrate.parts import PartSource
from checkpoint.migrate.plan import Plan, PlannedArray
from checkpoint.store.direct_file import buffer_at
from jaxserve.migration.arrays import planned, raw_array, step_arrays
from jaxserve.migration.lora import low_rank_updates
from jaxserve.migration.source import SourceModel, open_source
from models.config_json import config_to_json

Array: TypeAlias = npt.NDArray[Any]
BLOCK_ELEMENTS = 1 << 20
WHOLE_PARTS = 1 << 62


@dataclass(frozen=True)
class ArrayDifference:
    """One array that differs.

    Attributes:
        name: path of the parameter, or name of the array.
        what: "values", or why they cannot be compared.
        num_differing: how many values differ in their bits.
        max_abs: the largest difference; None if they cannot be compared.
        max_ulp: the largest distance in units of the last place, in the first one's dtype;
            None for dtypes that differ.
        first_index: of the first value that differs.
        first_values: there.
    """

    name: str
    what: str
    num_differing: int = 0
    max_abs: float | None = None
    max_ulp: int | None = None
    first_index: tuple[int, ...] | None = None
    first_values: tuple[str, str] | None = None


@dataclass(frozen=True)
class ModelDifference:
    """What differs between two models.

    Attributes:
        config: fields of the config, with both values.
        arrays: that differ.
        num_equal: arrays that do not.
    """

    config: Mapping[str, tuple[Any, Any]]
    arrays: tuple[ArrayDifference, ...]
    num_equal: int

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not self.config and not self.arrays

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            "equal": self.is_equal,
            "config": {name: list(values) for name, values in self.config.items()},
            "num_equal": self.num_equal,
            "arrays": [asdict(array) for array in self.arrays],
        }


def diff_models(first: Path, second: Path) -> ModelDifference:
    """Compare two models, parameter by parameter, and all else that both steps hold.

    Raises:
        FormatError, StoreError, FileNotFoundError: one of them cannot be read.
    """
    left, right = open_source(first), open_source(second)
    try:
        ours, theirs = _arrays(left), _arrays(right)
        differences = []
        for name in sorted(ours.keys() | theirs.keys()):
            if name not in ours or name not in theirs:
                where = "first" if name in ours else "second"
                differences.append(ArrayDifference(name, f"only in the {where}"))
                continue
            found = _compare((ours[name], left.parts), (theirs[name], right.parts))
            if found is not None:
                differences.append(found)
        num_all = len(ours.keys() | theirs.keys())
        return ModelDifference(_config(left, right), tuple(differences), num_all - len(differences))
    finally:
        left.close()
        right.close()


def _config(left: SourceModel, right: SourceModel) -> dict[str, tuple[Any, Any]]:
    ours, theirs = config_to_json(left.config), config_to_json(right.config)
    return {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}


def _arrays(source: SourceModel) -> dict[str, PlannedArray]:
    updates = low_rank_updates(source.model.lora)
    arrays = [planned(source, wanted, None, updates) for wanted in step_arrays(source, "scanned")]
    arrays += [raw_array(source, name, name) for name in source.others]
    return {array.name: array for array in arrays}


def _compare(
    left: tuple[PlannedArray, PartSource], right: tuple[PlannedArray, PartSource]
) -> ArrayDifference | None:
    ours, theirs = left[0], right[0]
    if ours.shape != theirs.shape:
        return ArrayDifference(ours.name, f"shapes {ours.shape} and {theirs.shape}")
    tally = _Tally(ours)
    for (start, mine), (_, other) in zip(_blocks(*left), _blocks(*right), strict=True):
        tally.add(start, mine, other)
    if ours.dtype != theirs.dtype and tally.num_differing == 0:
        return ArrayDifference(ours.name, f"dtypes {ours.dtype} and {theirs.dtype}, equal values")
    return tally.result(theirs)


def _blocks(array: PlannedArray, source: PartSource) -> Iterator[tuple[int, Array]]:
    """The array's values in order, with each block's first flat index: the same blocks for
    all arrays of one shape."""
    plan = Plan((array,), {}, (), window_bytes=WHOLE_PARTS)
    offset = 0
    for window in plan.windows(source):
        values = compute_window(window, source, buffer_at(0, window.num_bytes)).reshape(-1)
        for start in range(0, values.size, BLOCK_ELEMENTS):
            yield offset + start, values[start : start + BLOCK_ELEMENTS]
        offset += values.size


class _Tally:
    """Counts differences of one array, block by block."""

    def __init__(self, array: PlannedArray) -> None:
        self.num_differing = 0
        self._array = array
        self._max_abs = 0.0
        self._max_ulp: int | None = None
        self._first: tuple[int, str, str] | None = None

    def add(self, start: int, mine: Array, other: Array) -> None:
        """Compare one block that begins at the flat index `start`."""
        same_dtype = mine.dtype == other.dtype
        if same_dtype:
            differs = _bits(mine) != _bits(other)
        else:
            differs = mine.astype(np.float64) != other.astype(np.float64)
        if not differs.any():
            return
        index = np.flatnonzero(differs)
        a, b = mine[index], other[index]
        if self._first is None:
            self._first = (start + int(index[0]), str(a[0]), str(b[0]))
        self.num_differing += len(index)
        with np.errstate(invalid="ignore"):
            gaps = np.abs(a.astype(np.float64) - b.astype(np.float64))
        self._max_abs = max(self._max_abs, float(np.nan_to_num(gaps, nan=np.inf).max()))
        if same_dtype:
            ulps = np.abs(_ordered(a) - _ordered(b)).max()
            self._max_ulp = max(self._max_ulp or 0, int(ulps))

    def result(self, other: PlannedArray) -> ArrayDifference | None:
        """None if nothing differs."""
        if self._first is None:
            return None
        flat, mine, theirs = self._first
        index = tuple(int(i) for i in np.unravel_index(flat, self._array.shape or (1,)))
        dtypes = (self._array.dtype, other.dtype)
        return ArrayDifference(
            self._array.name,
            "values" if dtypes[0] == dtypes[1] else f"values, of {dtypes[0]} and {dtypes[1]}",
            self.num_differing,
            self._max_abs,
            self._max_ulp,
            index,
            (mine, theirs),
        )


def _bits(values: Array) -> Array:
    return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}")


def _ordered(values: Array) -> npt.NDArray[np.int64]:
    """Integers in the order of the values, next to each other for neighbouring floats."""
    bits = _bits(values).astype(np.int64)
    if values.dtype.kind in "iub":
        return values.astype(np.int64)
    half = np.int64(1) << (8 * values.dtype.itemsize - 1)
    negative = bits >= half if values.dtype.itemsize < 8 else bits < 0
    magnitude = bits - half if values.dtype.itemsize < 8 else bits ^ half
    return np.where(negative, -magnitude, bits)
