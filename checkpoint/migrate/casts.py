"""cast_into: as NumPy's copy with a cast, and faster where NumPy is slow: to float16."""

from __future__ import annotations

from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

CACHED_ELEMENTS = 1 << 16
"""So few at a time that the temporaries stay in the processor's cache."""
BITS_LOST = np.int32(23 - 10)
"""Of the mantissa."""
TOO_LARGE = np.float32(65520).view(np.int32)
"""From here on a number is infinity in float16."""
SMALLEST_NORMAL = np.float32(2.0**-14)
KEPT_BITS = np.int32(0x10000001)
"""Of a number that is shifted by `BITS_LOST`: the last one of the mantissa, by which a tie goes to
the even neighbour, and the sign, put where it stays in the lower half after one shift more."""
REBIAS = np.int32(((15 - 127) << 23) + (1 << 12) - 1)
"""To another bias of the exponent, and to half of what is cut off, rounded down."""
HALF = np.float32(0.5)
"""Added to a number below `SMALLEST_NORMAL`, its bits are the number's in float16, rounded."""
MAX_PICKED_SHARE = 1 / 8
"""Of numbers below `SMALLEST_NORMAL`: where there are more, all are made as these are."""


def cast_into(out: Array, values: Array) -> bool:
    """`out[...] = values`, cast to the dtype of `out`; the same bits as NumPy's cast.

    Returns:
        Whether every value is known to be finite, and to be so in `out`.
    """
    is_known = values.dtype in (np.float32, ml_dtypes.bfloat16)
    if not (out.dtype == np.float16 and is_known and values.ndim):
        np.copyto(out, values, casting="unsafe")
        return False
    if values.ndim == 2 and abs(values.strides[0]) < abs(values.strides[1]):
        out, values = out.T, values.T  # Along the source's memory.
    elif out.flags.c_contiguous and values.flags.c_contiguous:
        out, values = out.reshape(-1), values.reshape(-1)
    step = max(1, CACHED_ELEMENTS * len(values) // max(1, values.size))
    halves = _Halves((min(step, len(values)), *values.shape[1:]))
    fit = True
    for start in range(0, len(values), step):
        fit &= halves.cast_into(out[start : start + step], values[start : start + step])
    return fit


class _Halves:
    """Casts blocks of up to `shape`, in memory that it keeps."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._magnitudes = np.empty(shape, np.float32)
        self._made = np.empty(shape, np.int32)
        self._are_small = np.empty(shape, np.bool_)

    def cast_into(self, out: Array, values: Array) -> bool:
        """See the function."""
        num = len(values)
        magnitudes, made, are_small = (
            kept[:num] for kept in (self._magnitudes, self._made, self._are_small)
        )
        exact = values.astype(np.float32, copy=False)
        np.abs(exact, out=magnitudes)
        if magnitudes.view(np.int32).max(initial=0) >= TOO_LARGE:  # NaN, too.
            with np.errstate(over="ignore"):
                np.copyto(out, values, casting="unsafe")
            return False
        np.less(magnitudes, SMALLEST_NORMAL, out=are_small)
        bits = exact.view(np.int32)
        np.right_shift(bits, BITS_LOST, out=made)
        np.bitwise_and(made, KEPT_BITS, out=made)
        np.add(made, bits, out=made)
        np.add(made, REBIAS, out=made)
        np.right_shift(made, BITS_LOST, out=made)
        made_bits = out.view(np.int16)
        np.copyto(made_bits, made, casting="unsafe")
        small = np.flatnonzero(are_small)
        if len(small) > MAX_PICKED_SHARE * are_small.size:
            np.copyto(made_bits, _bits_of_small(exact), where=are_small)
        elif len(small):
            places = np.unravel_index(small, are_small.shape)
            made_bits[places] = _bits_of_small(exact[places])
        return True


def _bits_of_small(values: npt.NDArray[np.float32]) -> npt.NDArray[np.int16]:
    """In float16, of numbers below `SMALLEST_NORMAL`."""
    made = (np.abs(values) + HALF).view(np.int32)
    made -= HALF.view(np.int32)
    made |= (values.view(np.int32) >> np.int32(16)) & np.int32(0x8000)
    return made.astype(np.int16)
