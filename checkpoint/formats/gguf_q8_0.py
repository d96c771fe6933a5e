"""Q8_0, to the same bits as the `gguf` package writes it, in a program that XLA compiles.

A block takes two walks over its 32 elements, for which NumPy needs a dozen over all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]

ELEMENTS = 32
"""Of a block, which share a scale."""
BLOCK_BYTES = 2 + ELEMENTS
"""In the file: a float16, and int8."""
CALL_ELEMENTS = 1 << 20
"""What one call of the program takes; fewer are padded with zeros."""
CACHED_ELEMENTS = 1 << 15
"""What the program works on at a time, in the processor's cache."""
ENCODER_BYTES = CALL_ELEMENTS * 4 + 2 * CALL_ELEMENTS // ELEMENTS * BLOCK_BYTES
"""Memory of an encoder at work."""
MIN_COMPILED_ELEMENTS = 1 << 16
"""Fewer are left to the package, which takes no longer for them than one call."""
LARGEST_CODE = np.float32(127)
ALIGNMENT = 64
"""Memory that begins at multiples of this XLA reads where it is."""
INFINITY = np.float32(np.inf).view(np.uint32)
SMALLEST_COMPILED = np.float32(2.0**-110).view(np.uint32)
"""Least magnitude, but zero, that a block's largest may have. XLA takes subnormal numbers for zero:
below, a scale may be one, or be so small that a subnormal element gets another code than 0."""


class NotFinite(ValueError):
    """NaN or infinity among values that are to be quantised."""


class Q8Encoder:
    """Encodes matrices; not for two threads at once."""

    def __init__(self) -> None:
        raw = np.empty(CALL_ELEMENTS * 4 + ALIGNMENT, np.uint8)
        skipped = -raw.ctypes.data % ALIGNMENT
        self._values = raw[skipped : skipped + CALL_ELEMENTS * 4].view(np.float32)

    def room(self, shape: tuple[int, ...]) -> Floats | None:
        """Memory where up to `CALL_ELEMENTS` values may be put, to be encoded without a copy; None
        if there are more."""
        num = prod(shape)
        return self._values[:num].reshape(shape) if num <= CALL_ELEMENTS else None

    def encode(self, values: Array, out: npt.NDArray[np.uint8]) -> None:
        """`[rows, 32 * N]` of any floating dtype to `uint8[rows, 34 * N]`. Raises NotFinite.

        Args:
            values: what `room` gave, too. That memory is used in any case.
        """
        num_rows, num_columns = values.shape
        columns = min(num_columns, CALL_ELEMENTS)
        rows = max(1, CALL_ELEMENTS // max(1, columns))
        for row in range(0, num_rows, rows):
            for column in range(0, num_columns, columns):
                part = values[row : row + rows, column : column + columns]
                if part.ctypes.data != self._values.ctypes.data:
                    np.copyto(self._values[: part.size].reshape(part.shape), part)
                first = column // ELEMENTS * BLOCK_BYTES
                num_bytes = part.shape[1] // ELEMENTS * BLOCK_BYTES
                made = out[row : row + rows, first : first + num_bytes]
                made[...] = self._encoded(part.size).reshape(made.shape)

    def _encoded(self, num: int) -> npt.NDArray[np.uint8]:
        """The bytes of the first `num` values in the memory."""
        self._values[num:] = 0
        blocks, (largest, before_smallest) = program()(self._values)
        if largest >= INFINITY:
            raise NotFinite("there is NaN or infinity among the values")
        if before_smallest < SMALLEST_COMPILED - 1:
            with np.errstate(all="ignore"):  # As the package leaves it.
                return quantize(self._values[:num], GGMLQuantizationType.Q8_0)
        return blocks[: num // ELEMENTS * BLOCK_BYTES]


@cache
def program() -> Callable[[Array], tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]]:
    """`float32[CALL_ELEMENTS]`, aligned, to the blocks' bytes and two numbers: see `_encode`.

    Compiled at the first call: some tenths of a second, some tens of megabytes.
    """
    cpu = jax.local_devices(backend="cpu")[0]
    placed = jax.sharding.SingleDeviceSharding(cpu)
    compiled = jax.jit(_encode, in_shardings=placed, out_shardings=placed)
    largest_codes = jax.device_put(np.full(CACHED_ELEMENTS // ELEMENTS, LARGEST_CODE), cpu)

    def encode(values: Array) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint32]]:
        blocks, extremes = compiled(values, largest_codes)
        return np.asarray(blocks).reshape(-1), np.asarray(extremes)

    encode(np.zeros(CALL_ELEMENTS, np.float32))
    return encode


def _encode(values: jax.Array, largest_codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    """All values' blocks. Of the bits of the blocks' largest magnitudes: the largest, and the
    smallest less 1, which makes zero the largest of all.

    Args:
        values: `float32[N]`
        largest_codes: 127 for each block of a part: by one number XLA would not divide, but
            multiply by its inverse, which rounds twice.
    """
    blocks, extremes = jax.lax.map(
        lambda some: _encode_some(some, largest_codes), values.reshape(-1, CACHED_ELEMENTS)
    )
    return blocks, jnp.stack([extremes[:, 0].max(), extremes[:, 1].min()])


def _encode_some(values: jax.Array, largest_codes: jax.Array) -> tuple[jax.Array, jax.Array]:
    # The bits of numbers that are not negative are in the numbers' order, NaN above infinity, and
    # integers are compared faster. Two steps, so that the first one goes along vectors.
    bits = _bits(jnp.abs(values), jnp.int32).reshape(-1, 2, ELEMENTS // 2)
    halves = jax.lax.optimization_barrier(bits.max(axis=1))
    largest = halves.max(axis=1)
    # Kept apart: in one expression XLA would make one division of two.
    scales = jax.lax.optimization_barrier(_bits(largest, jnp.float32) / largest_codes)
    # Doubled, so that what is cut off of a product tells how to round it without a sum of floats,
    # which XLA would do in one step with the product and round once.
    twice_inverses = jnp.where(scales == 0, 0, 2 / scales)
    twice_inverses = jax.lax.optimization_barrier(twice_inverses)  # Else once for each element.
    rows = values.reshape(-1, ELEMENTS)
    magnitudes = ((jnp.abs(rows) * twice_inverses[:, None]).astype(jnp.int32) + 1) >> 1
    codes = jnp.where(rows < 0, -magnitudes, magnitudes).astype(jnp.int8)
    blocks = jnp.concatenate(
        [_bits(scales.astype(jnp.float16), jnp.uint8), _bits(codes, jnp.uint8)], axis=1
    )
    order = _bits(largest, jnp.uint32)
    return blocks, jnp.stack([order.max(), (order - 1).min()])


def _bits(values: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.bitcast_convert_type(values, dtype)
