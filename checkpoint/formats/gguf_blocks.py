"""GGUF's quantised blocks to float32 and back, in bounded memory.

The arithmetic is the `gguf` package's own; for Q8_0, which most exports are, it is done here to the
same bits in a third of the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

PLAIN_DTYPES: Mapping[GGMLQuantizationType, np.dtype[Any]] = {
    GGMLQuantizationType.F32: np.dtype("<f4"),
    GGMLQuantizationType.F16: np.dtype("<f2"),
    GGMLQuantizationType.BF16: np.dtype(ml_dtypes.bfloat16),
}
WRITABLE = ("F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0")
"""Types that can be written: the `gguf` package has no encoder for the K-quants."""
ELEMENTS_AT_A_TIME = 1 << 20
"""Blocks are coded for this many elements at a time, so that temporaries stay small."""
CACHED_ELEMENTS = 1 << 16
"""So few that the temporaries stay in the processor's cache."""
Q8_ELEMENTS, SCALE_BYTES = 32, 2


def row_bytes(num_elements: int, kind: GGMLQuantizationType) -> int:
    """Bytes that a row of so many elements takes."""
    block_elements, block_bytes = GGML_QUANT_SIZES[kind]
    return num_elements // block_elements * block_bytes


def decode_rows(
    raw: npt.NDArray[np.uint8], row_elements: int, kind: GGMLQuantizationType
) -> npt.NDArray[np.float32]:
    """`uint8[rows * bytes]` to `float32[rows, row_elements]`."""
    rows = raw.reshape(-1, row_bytes(row_elements, kind))
    out = np.empty((rows.shape[0], row_elements), np.float32)
    step = max(1, ELEMENTS_AT_A_TIME // row_elements)
    for start in range(0, rows.shape[0], step):
        out[start : start + step] = dequantize(rows[start : start + step], kind)
    return out


def encode_rows(values: npt.NDArray[Any], kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
    """`[rows, elements]` of any floating dtype to `uint8[rows, bytes]`."""
    rows = values.reshape(-1, values.shape[-1])
    out = np.empty((rows.shape[0], row_bytes(rows.shape[1], kind)), np.uint8)
    is_q8 = kind is GGMLQuantizationType.Q8_0
    step = max(1, (CACHED_ELEMENTS if is_q8 else ELEMENTS_AT_A_TIME) // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        block = np.ascontiguousarray(rows[start : start + step], np.float32)
        if is_q8:
            _encode_q8_0(block.reshape(-1, Q8_ELEMENTS), out[start : start + step])
        else:
            out[start : start + step] = quantize(block, kind)
    return out


def _encode_q8_0(blocks: npt.NDArray[np.float32], out: npt.NDArray[np.uint8]) -> None:
    """`float32[N, 32]` to N times a float16 scale and 32 bytes, rounded half away from zero."""
    scaled = np.abs(blocks)
    # Of numbers that are not negative the bits are in the numbers' order, and integers' are faster.
    largest = scaled.view(np.int32).max(axis=1, keepdims=True).view(np.float32)
    scale = largest / np.float32(127)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        np.multiply(blocks, np.where(scale == 0, np.float32(0), 1 / scale), out=scaled)
        whole = np.trunc(scaled)
        np.subtract(scaled, whole, out=scaled)
        np.add(scaled, scaled, out=scaled)
        np.add(whole, np.trunc(scaled, out=scaled), out=scaled)
        stored = out.reshape(len(blocks), -1)
        stored[:, :SCALE_BYTES] = scale.astype(np.float16).view(np.uint8)
        stored[:, SCALE_BYTES:] = scaled.astype(np.int8).view(np.uint8)
