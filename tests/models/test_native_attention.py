"""The native attention against the dense oracle, and the same bits from items of any shape."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.attention.registry import select
from models.ops.attention.work import AttentionTiling
from tests.native_library import native_library
from tools import attention_cases
from tools.attention_cases import Case, Inputs, Sequence

CASES = (
    Case("grouped", 4, 2, 32, "bfloat16", (Sequence(90), Sequence(36)), 3),
    Case("one KV head, tiles", 2, 1, 16, "float32", (Sequence(20, 9), Sequence(33, 1, False)), 11),
    Case("window, head dim 80", 1, 1, 80, "bfloat16", (Sequence(45, 9), Sequence(50)), 11, 20),
    Case("traced window", 2, 1, 16, "float32", (Sequence(40, 2), Sequence(70)), 4, 9, True),
    Case("head dim 8, long", 6, 2, 8, "float32", (Sequence(300, 20), Sequence(129)), 24),
)
# The stored values are the dtype's; sums are float32, and the result is rounded to the dtype.
TOLERANCE = {"float32": 2e-6, "bfloat16": 4e-3}


@pytest.fixture(autouse=True)
def loaded() -> None:
    native_library()


def run(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """A `Runner` of the battery."""
    native = select("native", "cpu")

    @jax.jit
    def step(q, k, v, pool, layer, work, window):
        pool = native.write(pool, k, v, layer, work)
        sliding = window if case.is_window_traced else case.window
        out = native.call(q, pool, layer, work, tiling=inputs.tiling, sliding_window=sliding)
        return out.astype(jnp.float32), pool

    layer, window = np.int32(inputs.layer), np.int32(case.window or 0)
    arrays = (inputs.q, inputs.k, inputs.v, inputs.pool, layer, inputs.work, window)
    out, pool = step(*arrays)
    return np.asarray(out), np.asarray(pool)


def inputs_of(case: Case, tile_rows: int = 8) -> Inputs:
    tiling = AttentionTiling(case.page_size, tile_rows=tile_rows)
    return attention_cases.build(case, tiling, np.random.default_rng(0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_native_kernels_pass_the_battery(case: Case) -> None:
    assert attention_cases.check(case, run, inputs_of(case)) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_do_not_depend_on_how_rows_are_cut_into_items(case: Case) -> None:
    wide, _ = run(case, inputs_of(case, 16))
    narrow, _ = run(case, inputs_of(case, 1))
    np.testing.assert_array_equal(wide, narrow)
    as_tiles = tuple(dataclasses.replace(one, as_decode=False) for one in case.sequences)
    tiles, _ = run(case, inputs_of(dataclasses.replace(case, sequences=as_tiles)))
    np.testing.assert_array_equal(wide, tiles)
