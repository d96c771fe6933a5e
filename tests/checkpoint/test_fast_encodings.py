"""What is encoded here for speed has the bits that NumPy and the `gguf` package give."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import quantize

from checkpoint.formats.gguf_blocks import encode_rows, row_bytes
from checkpoint.formats.gguf_q8_0 import NotFinite
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


def encoded(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    out = np.empty((len(values), row_bytes(values.shape[1], kind)), np.uint8)
    encode_rows(values, kind, out)
    return out


def numbers_for_q8_0() -> np.ndarray:
    """Weights, ties, zeros of both signs, scales that overflow or vanish, and any bits at all."""
    random = np.random.default_rng(0)
    values = random.normal(0, 0.02, (67, 2048)).astype(np.float32)
    values[:8] = random.integers(-254, 255, (8, 2048)) / 2  # Ties.
    values[:8, ::32] = 127
    for row, side in ((1, -np.inf), (2, np.inf)):
        beside = np.nextafter(values[row], np.float32(side))
        values[row] = np.where(np.arange(2048) % 32, beside, 127)
    values[8:10] = [[0.0], [-0.0]]
    for row, scale in enumerate((1e-37, 1e-39, 1e-43, 1e37)):
        values[10 + row] *= scale
    some_bits = random.integers(1 << 32, size=(8, 2048), dtype=np.uint32).view(np.float32)
    values[20:28] = np.where(np.isfinite(some_bits), some_bits, 0)
    return values


@pytest.mark.parametrize("width", [2048, 32, 67 * 2048])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_q8_0_is_the_gguf_packages(width: int, dtype: type) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        values = numbers_for_q8_0().reshape(-1, width).astype(dtype)
        values[~np.isfinite(values)] = 0
        wanted = quantize(values.astype(np.float32), kind)
        np.testing.assert_array_equal(encoded(values, kind), wanted)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 31), (2, 63)])
def test_what_is_not_finite_is_refused(
    kind: gguf.GGMLQuantizationType, bad: float, place: tuple[int, int]
) -> None:
    values = np.zeros((3, 64), np.float32)
    values[place] = bad
    with pytest.raises(NotFinite):
        encoded(values, kind)
