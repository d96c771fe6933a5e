"""One window's values: read, transform, cast or encode."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpoint.formats.gguf_blocks import encode_rows
from checkpoint.migrate.errors import MigrationError
from checkpoint.migrate.parts import PartSource
from checkpoint.migrate.plan import PlannedPart, Window, num_rows
from checkpoint.name_table import Transform
from checkpoint.store.tree import DTYPES

Array: TypeAlias = npt.NDArray[Any]


def compute_window(window: Window, source: PartSource) -> Array:
    """The target's values of a window: C-order, of the target's dtype, or `uint8[rows, bytes]`
    when the target is quantised.

    Raises:
        MigrationError: a value does not fit the target's dtype; the message names the array.
        FormatError, StoreError, OSError: the source cannot be read.
    """
    leafwise = _transformed(window, source)
    quantization = window.array.quantization
    if quantization is not None:
        return encode_rows(_finite(leafwise, window.array.name), quantization)
    return _cast(leafwise, DTYPES[window.array.dtype], window.array.name)


def _transformed(window: Window, source: PartSource) -> Array:
    part = window.part
    shape = source.shape(part.source)
    if part.layer is not None:
        shape = shape[1:]
    rows = slice(window.start, window.stop)
    is_whole = (window.start, window.stop) == (0, num_rows(part))
    index = [slice(0, size) for size in shape]
    to_leaf, to_file = part.to_leaf, part.to_file
    if not is_whole:
        index[-1 if part.swaps_axes else 0] = rows
        to_file = _for_rows(to_file, part, window.stop - window.start)
        if not part.swaps_axes:
            to_leaf = _for_rows(to_leaf, part, window.stop - window.start)
    values = _read(part, source, tuple(index))
    leaf = to_leaf.to_leaf(values)
    if part.low_rank is not None:
        update = np.float32(part.low_rank.scale) * (part.low_rank.a @ part.low_rank.b)
        leaf = leaf.astype(np.float32) + update  # Rounded once, to the target's dtype.
    made: Array = to_file.to_file(leaf)
    return made


def _read(part: PlannedPart, source: PartSource, index: tuple[slice, ...]) -> Array:
    if part.layer is None:
        return source.read_part(part.source, index)
    layer = slice(part.layer, part.layer + 1)
    values: Array = source.read_part(part.source, (layer, *index))[0]
    return values


def _for_rows(transform: Transform, part: PlannedPart, rows: int) -> Transform:
    if transform.num_groups is None:
        return transform
    return transform.of_groups(rows * transform.num_groups // part.shape[0])


def _cast(values: Array, dtype: np.dtype[Any], name: str) -> Array:
    if values.dtype == dtype:
        return np.asarray(values, order="C")  # Not `ascontiguousarray`: it has no rank 0.
    with np.errstate(over="ignore", invalid="ignore"):
        cast = values.astype(dtype, order="C")
    is_narrower = np.issubdtype(dtype, np.floating) or dtype.kind == "V"
    if (is_narrower and dtype.itemsize < values.dtype.itemsize) or dtype == np.float16:
        lost = np.isinf(cast.astype(np.float32)) & np.isfinite(values.astype(np.float32))
        if lost.any():
            worst = float(np.abs(values[lost].astype(np.float32)).max())
            raise MigrationError(
                f"{name} holds values up to {worst:.4g}, which {dtype.name} cannot; "
                "choose --dtype bfloat16 or float32"
            )
    return cast


def _finite(values: Array, name: str) -> Array:
    if not np.isfinite(values.astype(np.float32)).all():
        raise MigrationError(f"{name} holds NaN or infinity, which cannot be quantised")
    return values
