"""One window's values: read, transform, cast or encode."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

from checkpoint.formats.gguf_blocks import ELEMENTS_AT_A_TIME, encode_rows, encoder_for
from checkpoint.formats.gguf_q8_0 import CALL_ELEMENTS, NotFinite, Q8Encoder
from checkpoint.migrate.errors import MigrationError
from checkpoint.migrate.parts import PartSource
from checkpoint.migrate.plan import (
    PlannedArray,
    PlannedPart,
    Window,
    block_rows,
    is_as_read,
    is_copied,
    num_rows,
)
from checkpoint.migrate.tiles import copy_tiled
from checkpoint.name_table import Transform
from checkpoint.store.direct_file import Bytes
from checkpoint.store.tree import DTYPES

Array: TypeAlias = npt.NDArray[Any]

PIECE_BYTES = 1 << 20
"""Of the source, made into the target's at a time: it stays in the processor's cache, and the
memory is used again."""


def compute_window(window: Window, source: PartSource, buffer: Bytes) -> Array:
    """Fill `buffer`, of the window's size, with its bytes in the target.

    Returns:
        The same memory as the values: C-order, of the target's dtype, or flat bytes when the
        target is quantised.

    Raises:
        MigrationError: a value does not fit the target's dtype; the message names the array.
        FormatError, StoreError, OSError: the source cannot be read.
    """
    array, part = window.array, window.part
    if array.quantization is not None:
        _encode(window, source, buffer)
        return buffer
    shape = (window.stop - window.start, *part.shape[1:]) if part.shape else ()
    out = buffer.view(DTYPES[array.dtype]).reshape(shape)
    if is_copied(array, part, source):
        _read_into(part, source, _index(window, source), out)
    elif block_rows(part, source) is not None:
        _fill_columns(window, source, out)
    else:
        for piece in _pieces(window, source, PIECE_BYTES):
            made = out[piece.start - window.start : piece.stop - window.start] if shape else out
            _cast_into(made, _transformed(piece, source), array.name)
    return out


def _encode(window: Window, source: PartSource, out: Bytes) -> None:
    array, part = window.array, window.part
    dtype = source.dtype(part.source)
    rows = window.stop - window.start
    row_bytes = window.num_bytes // max(1, rows)
    encoder = encoder_for(array.quantization, rows * prod(part.shape[1:]))
    is_read_there = dtype == np.float32 and is_as_read(part)
    piece_bytes = PIECE_BYTES if encoder is None else CALL_ELEMENTS * dtype.itemsize
    for piece in _pieces(window, source, piece_bytes):
        room = None
        if is_read_there and encoder is not None:
            room = encoder.room((piece.stop - piece.start, *part.shape[1:]))
        if room is not None:
            _read_into(part, source, _index(piece, source), room)
        values = _transformed(piece, source) if room is None else room
        first, last = piece.start - window.start, piece.stop - window.start
        _encode_into(out[first * row_bytes : last * row_bytes], values, array, encoder)


def _pieces(window: Window, source: PartSource, piece_bytes: int) -> Iterator[Window]:
    """The window, cut into some of about `piece_bytes` if that can be."""
    array, part = window.array, window.part
    is_cut = part.can_be_cut and not part.swaps_axes and source.can_cut
    if not is_cut or part.index:  # Of one layer among many, only all rows lie together.
        yield window
        return
    bytes_a_row = prod(part.shape[1:]) * source.dtype(part.source).itemsize
    wanted = piece_bytes // max(1, bytes_a_row)
    step = max(1, wanted // part.row_alignment) * part.row_alignment
    for start in range(window.start, window.stop, step):
        yield Window(array, window.part_index, start, min(start + step, window.stop))


def _fill_columns(window: Window, source: PartSource, out: Array) -> None:
    """Where the target's columns are the source's rows: some of them after the other."""
    part = window.part
    step = block_rows(part, source)
    assert step is not None
    rows, *rest = _index(window, source)
    first, last, _ = rows.indices(part.shape[-1])
    widths = [columns.stop - columns.start for columns in rest]
    block = np.empty((min(step, last - first), *widths), source.dtype(part.source))
    for start in range(first, last, step):
        stop = min(start + step, last)
        values = block[: stop - start]
        _read_into(part, source, (slice(start, stop), *rest), values)
        made = part.to_file.to_file(part.to_leaf.to_leaf(values))
        _cast_into(out[..., start:stop], made, window.array.name)


def _transformed(window: Window, source: PartSource) -> Array:
    part = window.part
    to_leaf, to_file = part.to_leaf, part.to_file
    if (window.start, window.stop) != (0, num_rows(part)):
        rows = window.stop - window.start
        to_file = _for_rows(to_file, part, rows)
        if not part.swaps_axes:
            to_leaf = _for_rows(to_leaf, part, rows)
    leaf = to_leaf.to_leaf(_read(part, source, _index(window, source)))
    if part.low_rank is not None:
        update = np.float32(part.low_rank.scale) * (part.low_rank.a @ part.low_rank.b)
        leaf = leaf.astype(np.float32) + update  # Rounded once, to the target's dtype.
    made: Array = to_file.to_file(leaf)
    return made


def _index(window: Window, source: PartSource) -> tuple[slice, ...]:
    """What the window is made of, in the source's array or its layer."""
    part = window.part
    shape = source.shape(part.source)[len(part.index) :]
    index = [slice(0, size) for size in shape]
    if (window.start, window.stop) != (0, num_rows(part)):
        index[-1 if part.swaps_axes else 0] = slice(window.start, window.stop)
    return tuple(index)


def _read(part: PlannedPart, source: PartSource, index: tuple[slice, ...]) -> Array:
    values = source.read_part(part.source, (*_places(part), *index))
    return values.reshape(values.shape[len(part.index) :])


def _read_into(part: PlannedPart, source: PartSource, index: tuple[slice, ...], out: Array) -> None:
    source.read_into(part.source, (*_places(part), *index), out[(*(None,) * len(part.index), ...)])


def _places(part: PlannedPart) -> tuple[slice, ...]:
    return tuple(slice(place, place + 1) for place in part.index)


def _for_rows(transform: Transform, part: PlannedPart, rows: int) -> Transform:
    if transform.num_groups is None:
        return transform
    return transform.of_groups(rows * transform.num_groups // part.shape[0])


def _cast_into(out: Array, values: Array, name: str) -> None:
    with np.errstate(over="ignore", invalid="ignore"):
        fit = copy_tiled(out, values)
    dtype = out.dtype
    if fit or values.dtype == dtype:
        return
    is_narrower = np.issubdtype(dtype, np.floating) or dtype.kind == "V"
    if (is_narrower and dtype.itemsize < values.dtype.itemsize) or dtype == np.float16:
        if _largest(values) <= float(ml_dtypes.finfo(dtype).max):
            return
        lost = np.isinf(out.astype(np.float32)) & np.isfinite(values.astype(np.float32))
        if lost.any():
            worst = float(np.abs(values[lost].astype(np.float32)).max())
            raise MigrationError(
                f"{name} holds values up to {worst:.4g}, which {dtype.name} cannot; "
                "choose --dtype bfloat16 or float32"
            )


def _encode_into(
    buffer: Bytes, values: Array, array: PlannedArray, encoder: Q8Encoder | None
) -> None:
    assert array.quantization is not None
    rows = values.reshape(-1, values.shape[-1])
    try:
        encode_rows(rows, array.quantization, buffer.reshape(len(rows), -1), encoder)
    except NotFinite as error:
        raise MigrationError(
            f"{array.name} holds NaN or infinity, which cannot be quantised"
        ) from error


def _largest(values: Array) -> float:
    """The largest magnitude; NaN if one value is."""
    values = np.atleast_1d(values)
    step = max(1, ELEMENTS_AT_A_TIME * len(values) // max(1, values.size))
    largest = np.float32(0)
    for start in range(0, len(values), step):
        block = values[start : start + step].astype(np.float32, copy=False)
        largest = np.maximum(largest, np.maximum(block.max(initial=0), -block.min(initial=0)))
    return float(largest)
