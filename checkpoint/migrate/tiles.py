"""Copies of transposed matrices that stay in the processor's cache."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpoint.migrate.casts import cast_into

Array: TypeAlias = npt.NDArray[Any]

TILE = 256
PADDING = 16
"""Elements between the rows of a tile: those that lie a power of two apart would share a few
lines of the cache."""


def copy_tiled(out: Array, values: Array) -> bool:
    """`out[...] = values`, cast to the dtype of `out`.

    NumPy's own copy of a transposed matrix takes several times as long: it walks along one side
    and misses the cache at each step on the other.

    Returns:
        As `cast_into`.
    """
    if values.ndim < 2 or abs(values.strides[-1]) <= abs(values.strides[-2]):
        return cast_into(out, values)
    fit = True
    if values.ndim > 2:
        for target, matrix in zip(out, values, strict=True):
            fit &= copy_tiled(target, matrix)
        return fit
    rows, columns = values.shape
    tile = np.empty((TILE, TILE + PADDING), values.dtype)
    for column in range(0, columns, TILE):
        for row in range(0, rows, TILE):
            part = values[row : row + TILE, column : column + TILE]
            close = tile[: part.shape[1], : part.shape[0]]
            close[...] = part.T
            place = out[row : row + TILE, column : column + TILE]
            fit &= cast_into(place, close.T)
    return fit
