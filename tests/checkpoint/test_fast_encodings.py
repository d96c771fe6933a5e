"""What is encoded here for speed has the bits that NumPy and the `gguf` package give."""

from __future__ import annotations

import gguf
import ml_dtypes
import numpy as np
import pytest
from gguf.quants import quantize

from checkpoint.formats.gguf_blocks import encode_rows, encoder_for, row_bytes
from checkpoint.formats.gguf_q8_0 import CALL_ELEMENTS, MIN_COMPILED_ELEMENTS, NotFinite
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


Q8_0 = gguf.GGMLQuantizationType.Q8_0


def encoded(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    out = np.empty((len(values), row_bytes(values.shape[1], kind)), np.uint8)
    encode_rows(values, kind, out, encoder_for(kind, values.size))
    return out


def check_q8_0(values: np.ndarray) -> None:
    """Bytes as the package's."""
    assert values.size >= MIN_COMPILED_ELEMENTS
    with np.errstate(all="ignore"):
        wanted = quantize(values.astype(np.float32), Q8_0)
    np.testing.assert_array_equal(encoded(values, Q8_0), wanted)


def numbers_for_q8_0() -> np.ndarray:
    """Weights, ties and their neighbours, zeros of both signs, scales that overflow."""
    random = np.random.default_rng(0)
    values = random.normal(0, 0.02, (67, 2048)).astype(np.float32)
    values[:8] = random.integers(-254, 255, (8, 2048)) / 2  # Ties.
    values[:8, ::32] = 127
    for row, side in ((1, -np.inf), (2, np.inf)):
        beside = np.nextafter(values[row], np.float32(side))
        values[row] = np.where(np.arange(2048) % 32, beside, 127)
    values[8:10] = [[0.0], [-0.0]]
    values[10] *= 1e37
    values[11:19, 1::32] = 1e-45  # Subnormal, among others that are not.
    return values


@pytest.mark.parametrize("width", [2048, 32, 67 * 2048])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_q8_0_is_the_gguf_packages(width: int, dtype: type) -> None:
    with np.errstate(over="ignore"):
        values = numbers_for_q8_0().reshape(-1, width).astype(dtype)
    values[~np.isfinite(values)] = 0
    check_q8_0(values)


@pytest.mark.parametrize("scale", [1e-36, 1e-37, 1e-39, 1e-43])
def test_q8_0_of_scales_that_vanish_is_the_gguf_packages(scale: float) -> None:
    values = numbers_for_q8_0()
    values[20:40] *= np.float32(scale)
    check_q8_0(values)


def test_q8_0_of_any_bits_is_the_gguf_packages() -> None:
    """Of blocks with numbers of all sizes, and of such whose numbers are of one size."""
    random = np.random.default_rng(2)
    bits = random.integers(1 << 32, size=(64, 2048), dtype=np.uint32).view(np.float32)
    check_q8_0(np.where(np.isfinite(bits), bits, 0))
    sizes = 2.0 ** random.integers(-108, 120, (8192, 1))
    check_q8_0((random.uniform(-1, 1, (8192, 32)) * sizes).astype(np.float32))


def test_q8_0_of_every_short_float_is_the_gguf_packages() -> None:
    shorts = np.random.default_rng(3).permutation(1 << 16).astype(np.uint16)
    for dtype in (np.float16, ml_dtypes.bfloat16):
        values = shorts.view(dtype).astype(np.float32)
        values[~np.isfinite(values)] = 0
        check_q8_0(values.reshape(-1, 32))  # All sizes in a block.
        check_q8_0(np.sort(values).reshape(-1, 64))


def test_q8_0_of_more_than_a_call_takes_is_the_gguf_packages() -> None:
    values = np.random.default_rng(4).normal(0, 0.02, (3, CALL_ELEMENTS // 2)).astype(np.float32)
    check_q8_0(values)
    check_q8_0(values.reshape(1, -1))
    check_q8_0(values.reshape(-1, 96).T[:32])


def test_q8_0_of_the_encoders_own_memory_is_the_gguf_packages() -> None:
    encoder = encoder_for(Q8_0, CALL_ELEMENTS)
    assert encoder is not None
    assert encoder.room((CALL_ELEMENTS // 32 + 1, 32)) is None
    room = encoder.room((100, 1024))
    assert room is not None
    room[:] = np.random.default_rng(5).normal(0, 0.02, room.shape)
    wanted = quantize(room, Q8_0)
    out = np.empty((100, row_bytes(1024, Q8_0)), np.uint8)
    encode_rows(room, Q8_0, out, encoder)
    np.testing.assert_array_equal(out, wanted)


@pytest.mark.parametrize("width", [64, MIN_COMPILED_ELEMENTS])
@pytest.mark.parametrize("kind", [Q8_0, gguf.GGMLQuantizationType.Q4_1])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 31), (2, 63)])
def test_what_is_not_finite_is_refused(
    kind: gguf.GGMLQuantizationType, width: int, bad: float, place: tuple[int, int]
) -> None:
    values = np.zeros((3, width), np.float32)
    values[place] = bad
    with pytest.raises(NotFinite):
        encoded(values, kind)
