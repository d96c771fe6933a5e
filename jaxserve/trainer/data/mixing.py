"""splitmix64's finaliser: well-mixed bits of a number, the same everywhere.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

GOLDEN_64 = 0x9E3779B97F4A7C15
"""splitmix64's increment: consecutive multiples of it start independent numbers."""
_MASK_64 = (1 << 64) - 1
_FACTORS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def mix64(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """A permutation of uint64, elementwise."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(_FACTORS[0])
    values = (values ^ (values >> np.uint64(27))) * np.uint64(_FACTORS[1])
    return values ^ (values >> np.uint64(31))


def mix64_int(value: int) -> int:
    """`mix64` of one Python integer, taken modulo 2**64."""
    value &= _MASK_64
    value = ((value ^ (value >> 30)) * _FACTORS[0]) & _MASK_64
    value = ((value ^ (value >> 27)) * _FACTORS[1]) & _MASK_64
    return value ^ (value >> 31)
