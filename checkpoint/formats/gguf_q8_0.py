"""Q8_0, to the same bits as the `gguf` package writes it, in a third of its time.

NumPy is slow where its innermost loop is short, as it is along the 32 elements of a block, and so
is what leaves the processor's cache. Here every step goes along all elements of a few rows.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]

ELEMENTS = 32
"""Of a block, which share a scale."""
BLOCK = np.dtype([("scale", "<f2"), ("codes", f"V{ELEMENTS}")])
"""In the file. The codes are int8."""
LARGEST_CODE = np.float32(127)
BELOW_HALF = np.nextafter(np.float32(0.5), np.float32(0))
"""Added before the fraction is dropped it rounds half away from zero. A half itself would take
0.49999997, which the sum rounds up, to 1."""
INFINITY = np.float32(np.inf).view(np.int32)


class NotFinite(ValueError):
    """NaN or infinity among values that are to be quantised."""


class Q8Encoder:
    """Encodes up to `max_elements` at a time; not for two threads at once."""

    def __init__(self, max_elements: int) -> None:
        self._magnitudes = np.empty(max_elements, np.float32)
        self._spare = np.empty(max_elements, np.int32)
        self._codes = np.empty(max_elements, np.int8)
        self._signs = np.empty(max_elements, np.int8)

    def encode(self, values: Floats, out: npt.NDArray[np.uint8]) -> None:
        """`float32[32 * N]` to `uint8[34 * N]`, both contiguous. Raises NotFinite."""
        num = len(values)
        magnitudes, codes, signs = self._magnitudes[:num], self._codes[:num], self._signs[:num]
        np.abs(values, out=magnitudes)
        largest = self._largest(magnitudes.view(np.int32))
        if largest.max(initial=0) >= INFINITY:
            raise NotFinite("there is NaN or infinity among the values")
        scales = largest.view(np.float32) / LARGEST_CODE
        with np.errstate(divide="ignore", over="ignore"):
            inverses = 1 / scales
        inverses[np.isinf(inverses)] = 0  # Of zero, and of what is too small to have an inverse.
        magnitudes *= np.repeat(inverses, ELEMENTS)
        magnitudes += BELOW_HALF
        np.copyto(codes, magnitudes, casting="unsafe")
        np.less(values, 0, out=signs.view(np.bool_))
        np.negative(signs, out=signs)
        codes ^= signs  # -x is ~x + 1.
        codes -= signs
        blocks = out.view(BLOCK)
        with np.errstate(over="ignore"):
            blocks["scale"] = scales
        blocks["codes"] = codes.view(BLOCK["codes"])

    def _largest(self, bits: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
        """Of each block. The bits of numbers that are not negative are in the numbers' order, and
        integers are compared faster."""
        half = ELEMENTS // 2
        pairs = self._spare[: len(bits)]
        np.maximum(bits[:-half], bits[half:], out=pairs[:-half])
        # The first halves of the blocks have it; what lies between two blocks mixes them.
        found: npt.NDArray[Any] = pairs.view(f"V{half * 4}")[::2].copy().view(np.int32)
        for distance in (8, 4, 2):
            found = np.maximum(found[:-distance], found[distance:])
        largest: npt.NDArray[np.int32] = np.maximum(found[::half], found[1::half])
        return largest
