"""cast_into: as NumPy's copy with a cast, and faster where NumPy is slow: float32 to float16."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Array: TypeAlias = npt.NDArray[Any]

CACHED_ELEMENTS = 1 << 16
"""So few at a time that the temporaries stay in the processor's cache."""
MANTISSA_BITS_LOST = 23 - 10
TOO_LARGE = np.float32(65520).view(np.uint32)
"""From here on a number is infinity in float16."""
SMALLEST_NORMAL = np.float32(2.0**-14).view(np.uint32)
REBIAS = np.uint32((15 - 127) << 23 & 0xFFFFFFFF) + np.uint32((1 << MANTISSA_BITS_LOST - 1) - 1)
"""To another bias of the exponent, and to half of what is cut off, rounded down."""
HALF = np.float32(0.5)
"""Added to a number below `SMALLEST_NORMAL`, its bits are the number's in float16, rounded."""


def cast_into(out: Array, values: Array) -> None:
    """`out[...] = values`, cast to the dtype of `out`; the same bits as NumPy's cast."""
    if not (out.dtype == np.float16 and values.dtype == np.float32 and values.ndim):
        np.copyto(out, values, casting="unsafe")
        return
    step = max(1, CACHED_ELEMENTS * len(values) // max(1, values.size))
    for start in range(0, len(values), step):
        _halves_into(out[start : start + step], values[start : start + step])


def _halves_into(out: Array, values: Array) -> None:
    bits = values.view(np.uint32)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    if magnitude.max(initial=0) >= TOO_LARGE:  # NaN, too.
        with np.errstate(over="ignore"):
            np.copyto(out, values, casting="unsafe")
        return
    is_small = magnitude < SMALLEST_NORMAL
    small = (magnitude.view(np.float32) + HALF).view(np.uint32)
    small -= HALF.view(np.uint32)
    made = magnitude >> np.uint32(MANTISSA_BITS_LOST)
    made &= np.uint32(1)  # A tie goes to the even one.
    made += magnitude
    made += REBIAS
    made >>= np.uint32(MANTISSA_BITS_LOST)
    np.copyto(made, small, where=is_small)
    made |= (bits >> np.uint32(16)) & np.uint32(0x8000)
    np.copyto(out.view(np.uint16), made, casting="unsafe")
