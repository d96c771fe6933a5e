"""What is encoded here for speed has the bits that NumPy and the `gguf` package give."""

from __future__ import annotations

import gguf
import ml_dtypes
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


def check_cast(values: np.ndarray) -> None:
    """Bits as NumPy's, and the answer true only where all are finite."""
    with np.errstate(over="ignore"):
        wanted = values.astype(np.float16)
    for turned, target in ((values, wanted), (values.T, wanted.T)):
        for out in (np.empty(target.shape, np.float16), np.empty(target.T.shape, np.float16).T):
            assert cast_into(out, turned) == np.isfinite(wanted).all()
            np.testing.assert_array_equal(out.view(np.uint16), target.view(np.uint16))


def few_among_weights(values: np.ndarray) -> np.ndarray:
    """Them, one in twelve, among numbers that are normal in float16."""
    random = np.random.default_rng(0)
    weights = random.uniform(2.0**-14, 1, 12 * len(values)).astype(values.dtype)
    weights *= random.choice([-1, 1], len(weights)).astype(values.dtype)
    weights[::12] = values
    return weights


def test_float16_is_numpys() -> None:
    values = numbers_around_float16()
    with np.errstate(over="ignore"):
        finite = values[np.isfinite(values.astype(np.float16))]
    is_normal = np.abs(finite) >= 2.0**-14
    normal, few = finite[is_normal], few_among_weights(finite[~is_normal])
    for numbers in (values, finite, normal, few):  # Each goes another way.
        check_cast(np.resize(numbers, (8, len(numbers) // 8 + 1)))
    check_cast(np.resize(few, (3, 7, 40_000)))
    check_cast(np.resize(few, (8, 90_000))[:, ::3])


def test_float16_of_any_bits_is_numpys() -> None:
    bits = np.random.default_rng(1).integers(1 << 32, size=1 << 18, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[~np.isnan(values)]
    check_cast(values[None])
    check_cast(few_among_weights(values[np.abs(values) < 65520])[None])


@pytest.mark.parametrize("is_finite", [False, True])
def test_float16_of_every_bfloat16_is_numpys(is_finite: bool) -> None:
    values = np.arange(1 << 16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    if is_finite:
        check_cast(few_among_weights(values[np.abs(values.astype(np.float32)) < 65520])[None])
    else:
        check_cast(values[None])


def test_no_numbers_are_cast() -> None:
    assert cast_into(np.empty((0, 3), np.float16), np.empty((0, 3), np.float32))
    one = np.empty((), np.float16)
    cast_into(one, np.float32(1.5).reshape(()))
    assert one == 1.5


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
