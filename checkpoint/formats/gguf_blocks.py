"""GGUF's quantised blocks to float32 and back, in bounded memory.

The arithmetic is the `gguf` package's own, except for Q8_0, which most exports are: see
`gguf_q8_0.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize

from checkpoint.formats.gguf_q8_0 import MIN_COMPILED_ELEMENTS, NotFinite, Q8Encoder

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


def encoder_for(kind: GGMLQuantizationType | None, num_elements: int) -> Q8Encoder | None:
    """What encodes so many elements faster than the `gguf` package; for one thread at a time."""
    is_faster = kind is GGMLQuantizationType.Q8_0 and num_elements >= MIN_COMPILED_ELEMENTS
    return Q8Encoder() if is_faster else None


def encode_rows(
    values: npt.NDArray[Any],
    kind: GGMLQuantizationType,
    out: npt.NDArray[np.uint8],
    encoder: Q8Encoder | None = None,
) -> None:
    """`[rows, elements]` of any floating dtype to `uint8[rows, bytes]`. Raises NotFinite.

    Args:
        encoder: one of `encoder_for` of this kind.
    """
    if encoder is not None:
        encoder.encode(values, out)
        return
    row_elements = values.shape[-1]
    step = max(1, ELEMENTS_AT_A_TIME // row_elements)
    for start in range(0, len(values), step):
        block = np.ascontiguousarray(values[start : start + step], np.float32)
        if not np.isfinite(block).all():
            raise NotFinite("there is NaN or infinity among the values")
        out[start : start + step] = quantize(block, kind)
