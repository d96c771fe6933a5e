"""GGUF's quantised blocks to float32 and back, in bounded memory.

The arithmetic is the `gguf` package's own.
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
    step = max(1, ELEMENTS_AT_A_TIME // rows.shape[1])
    for start in range(0, rows.shape[0], step):
        block = np.ascontiguousarray(rows[start : start + step], np.float32)
        out[start : start + step] = quantize(block, kind)
    return out
