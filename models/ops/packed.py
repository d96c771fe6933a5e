"""Kernels as the native products read them: cut into blocks of output columns.

`models/ops/native_kernels/src/layout.h` draws the layouts. Every product sums in one order that
depends on the kernel alone: a row's bits are the same in every bucket, beside any other rows and
with any number of threads. Rows are rounded to 8 bits, in groups of 32 inputs with a scale each,
before they meet a kernel of integers, as llama.cpp does.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

GROUP = 32
"""Inputs that share a scale."""
FLOAT_COLUMNS, INT_COLUMNS = 32, 16
"""Output columns of a block."""


class Kind(IntEnum):
    """What a packed kernel holds; numbers are those of layout.h."""

    FLOAT32 = 0
    BFLOAT16 = 1
    INT8 = 2
    """8-bit codes with a float32 scale for each column."""
    Q8 = 3
    """8-bit codes with a float16 scale for each 32 inputs of a column."""
    Q4 = 4
    """4-bit codes with a float16 scale and minimum for each 32 inputs of a column."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["blocks"],
    meta_fields=["kind", "num_in", "num_out"],
)
@dataclass(frozen=True, slots=True)
class PackedKernel:
    """One projection's kernels of all layers, `[in, out]` each."""

    blocks: Any
    """`uint8 [L, packed_bytes]`"""
    kind: Kind
    num_in: int
    num_out: int

    def multiply(
        self,
        x: jax.Array,
        layer: jax.Array | int,
        num_live: jax.Array | int | None = None,
        dtype: Any = None,
    ) -> jax.Array:
        """`x [T, in]`, float32 or bfloat16, times the kernel of one layer, `[T, out]`.

        Args:
            layer: index on the first axis of `blocks`, of which nothing is copied.
            num_live: only the first so many rows are multiplied, the others become zeros; by
                default all.
            dtype: of the result; by default that of `x`.
        """
        result = jax.ShapeDtypeStruct((x.shape[0], self.num_out), dtype or x.dtype)
        call = jax.ffi.ffi_call("jaxserve_linear", result)
        index = jnp.asarray(layer, jnp.int32)
        live = jnp.asarray(x.shape[0] if num_live is None else num_live, jnp.int32)
        product: jax.Array = call(x, self.blocks, index, live, kind=np.int64(self.kind))
        return product


@dataclass(frozen=True, slots=True)
class Codes:
    """Kernels in few bits, before they are packed; G groups of 32 inputs."""

    codes: Array
    """`uint8 [..., in, out]`: 0 .. 15 with minima, else the signed code + 128."""
    scales: Array
    """`float16 [..., G, out]`, or `float32 [..., out]`, one for a column."""
    minima: Array | None
    """`float16 [..., G, out]`: a weight is scale * code + minimum."""

    @property
    def kind(self) -> Kind:
        if self.minima is not None:
            return Kind.Q4
        return Kind.INT8 if self.scales.dtype == np.float32 else Kind.Q8


def packed_bytes(kind: Kind, num_in: int, num_out: int) -> int:
    """Bytes of one layer's packed kernel."""
    groups = -(-num_in // GROUP)
    if kind in (Kind.FLOAT32, Kind.BFLOAT16):
        rows = num_in if kind == Kind.FLOAT32 else -(-num_in // 2)
        return -(-num_out // FLOAT_COLUMNS) * rows * FLOAT_COLUMNS * 4
    block = {Kind.INT8: groups * 512 + 64, Kind.Q8: groups * 544, Kind.Q4: groups * 320}[kind]
    return -(-num_out // INT_COLUMNS) * block


def abstract_packed(kind: Kind, num_layers: int, num_in: int, num_out: int) -> PackedKernel:
    """A `PackedKernel` of `jax.ShapeDtypeStruct`."""
    shape = (num_layers, packed_bytes(kind, num_in, num_out))
    return PackedKernel(jax.ShapeDtypeStruct(shape, np.uint8), kind, num_in, num_out)


def pack(kernels: Array | Codes) -> PackedKernel:
    """Packs kernels `[L, in, out]`, float32 or bfloat16 or as codes; `blocks` stay on the host."""
    values = kernels.codes if isinstance(kernels, Codes) else kernels
    num_layers, num_in, num_out = values.shape
    if isinstance(kernels, Codes):
        kind = kernels.kind
    else:
        kind = Kind.BFLOAT16 if values.dtype == ml_dtypes.bfloat16 else Kind.FLOAT32
    blocks = np.empty((num_layers, packed_bytes(kind, num_in, num_out)), np.uint8)
    for layer in range(num_layers):
        if isinstance(kernels, Codes):
            minima = None if kernels.minima is None else kernels.minima[layer]
            one = _pack_codes(Codes(kernels.codes[layer], kernels.scales[layer], minima))
        else:
            one = _pack_floats(values[layer])
        blocks[layer] = one.reshape(-1)
    return PackedKernel(blocks, kind, num_in, num_out)


def _pack_floats(kernel: Array) -> Array:
    """One kernel `[in, out]` to bytes."""
    num_in = kernel.shape[0]
    if kernel.dtype == np.float32:
        columns = _pad(kernel, 1, FLOAT_COLUMNS).reshape(num_in, -1, FLOAT_COLUMNS)
        return _bytes(columns.transpose(1, 0, 2))
    bits = _pad(_pad(kernel.view(np.uint16), 0, 2), 1, FLOAT_COLUMNS)
    pairs = _neighbours(bits, 2, np.uint32).reshape(bits.shape[0] // 2, -1, FLOAT_COLUMNS)
    return _bytes(pairs.transpose(1, 0, 2))


def _pack_codes(kernel: Codes) -> Array:
    """One kernel to bytes."""
    codes = _pad(_pad(kernel.codes, 0, GROUP), 1, INT_COLUMNS)
    groups, blocks = codes.shape[0] // GROUP, codes.shape[1] // INT_COLUMNS
    if kernel.kind == Kind.Q4:
        halves = codes.reshape(groups * 4, 2, 4, -1)
        codes = (halves[:, 0] | halves[:, 1] << 4).reshape(groups * 16, -1)
    quads = _neighbours(codes, 4, np.uint32).reshape(groups, -1, blocks, INT_COLUMNS)
    in_bytes = _bytes(quads.transpose(2, 0, 1, 3)).reshape(blocks, groups, -1)
    if kernel.kind == Kind.INT8:
        scales = _bytes(_pad(kernel.scales, 0, INT_COLUMNS).reshape(blocks, INT_COLUMNS))
        return np.concatenate([in_bytes.reshape(blocks, -1), scales], axis=1)
    parts = [in_bytes]
    for numbers in (kernel.scales, kernel.minima):
        if numbers is not None:
            columns = _pad(numbers, 1, INT_COLUMNS).reshape(groups, blocks, INT_COLUMNS)
            parts.append(_bytes(columns.transpose(1, 0, 2)))
    return np.concatenate(parts, axis=2)


def _neighbours(array: Array, count: int, dtype: npt.DTypeLike) -> Array:
    """`count` following rows of `[rows, columns]` side by side in one number: `[rows / count,
    columns]`, whose bytes are a column's. Far faster than to move single bytes across axes."""
    rows, columns = array.shape
    groups = array.reshape(rows // count, count, columns)
    beside = np.empty((rows // count, columns, count), array.dtype)
    for index in range(count):
        beside[..., index] = groups[:, index]
    return beside.view(dtype)[..., 0]


def _pad(array: Array, axis: int, multiple: int) -> Array:
    """Zeros at the end of one axis, up to a multiple."""
    missing = -array.shape[axis] % multiple
    if not missing:
        return array
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return np.pad(array, widths)


def _bytes(array: Array) -> Array:
    """Its bytes, on the last axis."""
    return np.ascontiguousarray(array).view(np.uint8)
