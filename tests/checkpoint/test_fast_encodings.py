"""What is encoded here for speed has the bits that NumPy and the `gguf` package give."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import quantize

from checkpoint.formats.gguf_blocks import encode_rows
from checkpoint.migrate.casts import cast_into


def numbers_around_float16() -> np.ndarray:
    """Every float16 as float32, the middles between two, and the neighbours of all these."""
    with np.errstate(invalid="ignore"):
        halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        positive = halves[:0x7C00].astype(np.float64)
        middles = ((positive[1:] + positive[:-1]) / 2).astype(np.float32)
        largest = np.array([65519.996, 65520, 65521, 1e30, 2.0**-25, 1e-45, 0], np.float32)
        found = np.concatenate([halves, middles, -middles, largest, -largest])
        neighbours = [np.nextafter(found, np.float32(side)) for side in (-np.inf, np.inf)]
    return np.concatenate([found, *neighbours])


@pytest.mark.parametrize("turned", [False, True])
def test_float16_is_numpys(turned: bool) -> None:
    values = np.resize(numbers_around_float16(), (8, 70_000))
    if turned:
        values = values.T
    out = np.empty(values.shape, np.float16)
    with np.errstate(over="ignore"):
        wanted = values.astype(np.float16)
    cast_into(out, values)
    np.testing.assert_array_equal(out.view(np.uint16), wanted.view(np.uint16))
    # Blocks without NaN and infinity go another way than those with them.
    finite = np.where(np.isfinite(wanted), values, 0).astype(np.float32)
    cast_into(out, finite)
    np.testing.assert_array_equal(out.view(np.uint16), finite.astype(np.float16).view(np.uint16))


def test_q8_0_is_the_gguf_packages() -> None:
    random = np.random.default_rng(0)
    values = random.normal(0, 0.02, (64, 2048)).astype(np.float32)
    values[:8] = random.integers(-254, 255, (8, 2048)) / 2  # Ties.
    values[:8, ::32] = 127
    values[8:10] = [[0.0], [-0.0]]
    for row, scale in enumerate((1e-37, 1e-39, 1e-43, 1e37)):
        values[10 + row] *= scale
    wanted = quantize(values, gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(encode_rows(values, gguf.GGMLQuantizationType.Q8_0), wanted)
    half = values.astype(np.float16)
    wanted = quantize(half.astype(np.float32), gguf.GGMLQuantizationType.Q8_0)
    np.testing.assert_array_equal(encode_rows(half, gguf.GGMLQuantizationType.Q8_0), wanted)
