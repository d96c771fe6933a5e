"""The native products against float64, and the same bits whatever rows and threads there are."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from models.ops.native import NativeError, NativeLibrary
from models.ops.packed import Codes, Kind, PackedKernel, abstract_packed, pack
from tests.native_library import native_library

SIZES = [(64, 48), (71, 37), (1, 1), (33, 130)]
LAYERS = 2
GROUP = 32


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    library = native_library()
    num_threads, best = library.num_threads, library.instruction_sets()[0]
    yield library
    library.set_num_threads(num_threads)
    library.choose(best)


def kernels(kind: Kind, num_in: int, num_out: int) -> tuple[PackedKernel, np.ndarray]:
    """Random packed kernels, and the float64 `[L, in, out]` that they stand for."""
    rng = np.random.default_rng(int(kind))
    shape, groups = (LAYERS, num_in, num_out), -(-num_in // GROUP)
    if kind in (Kind.FLOAT32, Kind.BFLOAT16):
        dtype = np.float32 if kind == Kind.FLOAT32 else ml_dtypes.bfloat16
        values = rng.normal(size=shape).astype(dtype)
        return pack(values), values.astype(np.float64)
    codes = rng.integers(0, 16 if kind == Kind.Q4 else 256, shape).astype(np.uint8)
    per_group = (LAYERS, groups, num_out)
    scales = rng.uniform(0.01, 2, per_group).astype(np.float16)
    minima = rng.normal(size=per_group).astype(np.float16) if kind == Kind.Q4 else None
    if kind == Kind.INT8:
        scales = rng.uniform(0.01, 2, (LAYERS, num_out)).astype(np.float32)
        wide = scales[:, None, :].astype(np.float64)
    else:
        wide = np.repeat(scales.astype(np.float64), GROUP, axis=1)[:, :num_in]
    packed = pack(Codes(codes, scales, minima))
    if minima is None:
        return packed, (codes.astype(np.float64) - 128) * wide
    added = np.repeat(minima.astype(np.float64), GROUP, axis=1)[:, :num_in]
    return packed, codes * wide + added


def rounded(x: np.ndarray) -> np.ndarray:
    """Rows as integer kernels meet them: each 32 inputs in 255 steps."""
    padded = np.pad(x, ((0, 0), (0, -x.shape[1] % GROUP))).reshape(x.shape[0], -1, GROUP)
    largest = np.abs(padded).max(-1, keepdims=True)
    inverse = np.where(largest > 0, np.float32(127) / np.maximum(largest, 1e-30), 0)
    codes = np.rint(padded * inverse.astype(np.float32))
    back = codes.astype(np.float64) * (largest / np.float32(127))
    return back.reshape(x.shape[0], -1)[:, : x.shape[1]]


@jax.jit
def multiply(kernel: PackedKernel, x: jax.Array, layer: jax.Array) -> jax.Array:
    return kernel.multiply(x, layer)


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("num_in", "num_out"), SIZES)
def test_a_product_is_that_of_what_codes_and_rounded_rows_stand_for(
    kind: Kind, num_in: int, num_out: int, library: NativeLibrary
) -> None:
    packed, values = kernels(kind, num_in, num_out)
    shapes = abstract_packed(kind, LAYERS, num_in, num_out)
    assert shapes.blocks.shape == packed.blocks.shape
    x = np.random.default_rng(9).normal(size=(5, num_in)).astype(np.float32)
    met = rounded(x) if kind >= Kind.INT8 else x.astype(np.float64)
    for name in library.instruction_sets():
        library.choose(name)
        for layer in range(LAYERS):
            out = np.asarray(multiply(packed, x, np.int32(layer)))
            # Sums in float32 of `num_in` terms; `size` is what they could add up to.
            size = np.abs(met) @ np.abs(values[layer])
            assert (np.abs(out - met @ values[layer]) <= 1e-6 * size + 1e-30).all(), name


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_a_rows_bits_do_not_depend_on_rows_beside_it_or_threads(
    kind: Kind, library: NativeLibrary
) -> None:
    packed, _ = kernels(kind, 160, 336)
    x = np.random.default_rng(3).normal(size=(53, 160)).astype(np.float32)
    for name in library.instruction_sets():
        library.choose(name)
        library.set_num_threads(1)
        whole = np.asarray(multiply(packed, x, np.int32(1)))
        for num_threads in (1, 2, 3):
            library.set_num_threads(num_threads)
            for rows in (1, 2, 5, 12, 33, 50):  # 48 and more take another way
                some = np.asarray(multiply(packed, x[:rows], np.int32(1)))
                np.testing.assert_array_equal(some, whole[:rows], err_msg=name)
                last = np.asarray(multiply(packed, x[-rows:], np.int32(1)))
                np.testing.assert_array_equal(last, whole[-rows:], err_msg=name)


@pytest.mark.parametrize(("num_in", "num_out"), SIZES)
def test_bfloat16_rows_and_weights_keep_their_bits_beside_other_rows(
    num_in: int, num_out: int, library: NativeLibrary
) -> None:
    packed, values = kernels(Kind.BFLOAT16, num_in, num_out)
    x = np.random.default_rng(4).normal(size=(83, num_in)).astype(ml_dtypes.bfloat16)
    as_float32 = jax.jit(lambda rows: packed.multiply(rows, 1, dtype=jnp.float32))
    met = x.astype(np.float64)
    for name in library.instruction_sets():  # with a matrix unit, tiles of 16 rows and 32 inputs
        library.choose(name)
        library.set_num_threads(2)
        whole = np.asarray(as_float32(x))
        size = np.abs(met) @ np.abs(values[1])
        assert (np.abs(whole - met @ values[1]) <= 1e-6 * size + 1e-30).all(), name
        for rows in (1, 15, 17, 32, 33, 64):
            library.set_num_threads(rows % 3 + 1)
            np.testing.assert_array_equal(as_float32(x[:rows]), whole[:rows], err_msg=name)
            np.testing.assert_array_equal(as_float32(x[-rows:]), whole[-rows:], err_msg=name)


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16], ids=["float32", "bfloat16"])
def test_rows_past_the_live_ones_are_zero_and_change_nothing(
    kind: Kind, dtype: type, library: NativeLibrary
) -> None:
    packed, _ = kernels(kind, 64, 48)
    x = np.random.default_rng(3).normal(size=(9, 64)).astype(dtype)
    whole = np.asarray(multiply(packed, x, np.int32(1)))
    x[6:] = np.nan  # never looked at
    for num_live in (0, 1, 6):
        live = jnp.int32(num_live)
        out = np.asarray(jax.jit(packed.multiply)(x, jnp.int32(1), live))
        np.testing.assert_array_equal(out[:num_live], whole[:num_live])
        assert not out[num_live:].any()


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
def test_bfloat16_rows_are_multiplied_as_float32_and_rounded_once(
    kind: Kind, library: NativeLibrary
) -> None:
    packed, _ = kernels(kind, 64, 48)
    for rows in (7, 50):
        x = jnp.asarray(np.random.default_rng(1).normal(size=(rows, 64)), jnp.bfloat16)
        wide = multiply(packed, x.astype(jnp.float32), np.int32(0))
        out = multiply(packed, x, np.int32(0))
        assert out.dtype == jnp.bfloat16
        np.testing.assert_array_equal(np.asarray(out), np.asarray(wide.astype(jnp.bfloat16)))


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name)
@pytest.mark.parametrize(("num_rows", "bad"), [(9, np.nan), (50, np.inf)])
def test_a_row_with_nan_or_infinity_shows_and_spoils_no_other(
    kind: Kind, num_rows: int, bad: float, library: NativeLibrary
) -> None:
    packed, _ = kernels(kind, 64, 48)
    x = np.random.default_rng(1).normal(size=(num_rows, 64)).astype(np.float32)
    clean = np.asarray(multiply(packed, x, np.int32(0)))
    x[4, 40] = bad
    out = np.asarray(multiply(packed, x, np.int32(0)))
    assert not np.isfinite(out[4]).any()
    np.testing.assert_array_equal(np.delete(out, 4, 0), np.delete(clean, 4, 0))


def test_what_does_not_fit_is_refused(library: NativeLibrary) -> None:
    packed, _ = kernels(Kind.Q4, 64, 48)
    x = np.zeros((2, 64), np.float32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="no such layer"):
        jax.block_until_ready(multiply(packed, x, np.int32(LAYERS)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="another size"):
        jax.block_until_ready(multiply(packed, x[:, :20], np.int32(0)))
    with pytest.raises(NativeError, match=r"choose from: .*plain"):
        library.choose("neon")
