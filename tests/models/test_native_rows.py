"""What the native kernels compute of single rows, against float64 and against the sampler's own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.engine.sampler import row_peaks
from models.ops.activation import ACTIVATIONS
from models.ops.native import NativeLibrary
from models.ops.native_rows import NATIVE_GATES, native_gate, native_peaks
from tests.native_library import native_library


@pytest.fixture
def library() -> Iterator[NativeLibrary]:
    library = native_library()
    yield library
    library.choose(library.instruction_sets()[0])


@pytest.mark.parametrize("activation", NATIVE_GATES)
@pytest.mark.parametrize("width", [48, 37])
def test_gates_are_the_activations_of_float64(
    activation: str, width: int, library: NativeLibrary
) -> None:
    rows = np.random.default_rng(0).normal(size=(7, 2 * width)).astype(np.float32)
    rows[0, :5] = -100, -20, 0, 20, 100
    with jax.enable_x64(True):
        wide = jnp.asarray(rows, jnp.float64)
        wanted = np.asarray(ACTIVATIONS[activation](wide[:, :width]) * wide[:, width:])
    run = jax.jit(partial(native_gate, activation=activation))
    for name in library.instruction_sets():
        library.choose(name)
        np.testing.assert_allclose(run(rows), wanted, rtol=2e-6, atol=1e-6, err_msg=name)
        narrow = run(jnp.asarray(rows, jnp.bfloat16))
        from_narrow = run(jnp.asarray(rows, jnp.bfloat16).astype(jnp.float32))
        np.testing.assert_array_equal(narrow, from_narrow.astype(jnp.bfloat16), err_msg=name)


@pytest.mark.parametrize("activation", NATIVE_GATES)
def test_a_rows_gate_depends_on_that_row_alone(activation: str, library: NativeLibrary) -> None:
    rows = np.random.default_rng(1).normal(size=(33, 2 * 1100)).astype(np.float32)
    run = jax.jit(lambda x, num_live: native_gate(x, activation, num_live))
    whole = np.asarray(run(rows, 33))
    for num_live in (0, 1, 32):
        some = np.asarray(run(np.where(np.arange(33)[:, None] < num_live, rows, np.nan), num_live))
        np.testing.assert_array_equal(some[:num_live], whole[:num_live])
        assert not some[num_live:].any()
    rows[3, 7] = np.nan
    spoiled = np.asarray(run(rows, 33))
    assert np.isnan(spoiled[3, 7])
    np.testing.assert_array_equal(np.delete(spoiled, 3, 0), np.delete(whole, 3, 0))


@pytest.mark.parametrize("width", [1, 50, 4099])
def test_peaks_are_the_first_of_the_largest(width: int, library: NativeLibrary) -> None:
    rng = np.random.default_rng(width)
    rows = rng.integers(-9, 9, (12, width)).astype(np.float32)  # with many equal ones
    rows[1] = -np.inf
    rows[2] = np.finfo(np.float32).min
    rows[3, width // 2] = np.inf
    wanted_index, wanted_finite = row_peaks(jnp.asarray(rows))
    find = jax.jit(native_peaks)
    for name in library.instruction_sets():
        library.choose(name)
        index, is_finite = find(rows, 11)
        np.testing.assert_array_equal(index[:11], wanted_index[:11], err_msg=name)
        np.testing.assert_array_equal(is_finite[:11], wanted_finite[:11], err_msg=name)
        assert index[11] == 0
        assert not is_finite[11]
        for place in {0, width // 2, width - 1}:
            spoiled = rows.copy()
            spoiled[5, place] = np.nan
            index, is_finite = find(spoiled, 12)
            assert not is_finite[5], name
            assert 0 <= index[5] < width


def test_what_does_not_fit_is_refused(library: NativeLibrary) -> None:
    del library
    with pytest.raises(jax.errors.JaxRuntimeError, match="float32 or bfloat16"):
        jax.block_until_ready(native_gate(jnp.zeros((2, 8), jnp.int32), "silu"))
