"""One battery for every implementation of attention over pages, against the dense oracle."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import ModuleType

import numpy as np
import pytest

from models.ops.attention.triton_attention import FLOAT32, TritonAttention
from tools import attention_cases
from tools.attention_cases import BATTERY, Case, Sequence
from tools.gpu_attention.step import run_eagerly

SMALL = dataclasses.replace(FLOAT32, decode_block=16, split_keys=16, tile_rows=16, tile_block=16)
"""The interpreter takes its time by the program, so that little is split often."""
TILE_ROWS = 8
SMALL_CASES = (
    Case("grouped, splits", 4, 2, 32, "bfloat16", (Sequence(90), Sequence(36), Sequence(37)), 5),
    Case("one KV head, tiles", 3, 1, 16, "float32", (Sequence(20, 11), Sequence(33, 1, False)), 13),
    # MASKED * scale is rounded up at 64, 80 and 256, and down at 128.
    Case("window, head dim 64", 2, 1, 64, "float32", (Sequence(60, 10), Sequence(50)), 12, 20),
    Case("window, head dim 80", 2, 1, 80, "bfloat16", (Sequence(60, 10), Sequence(50)), 12, 20),
    Case("traced window", 2, 1, 16, "float32", (Sequence(40, 9), Sequence(70)), 11, 9, True),
)


@pytest.mark.parametrize("case", BATTERY[3:8:4] + SMALL_CASES, ids=lambda case: case.name)
def test_the_reference_passes_the_battery(case: Case) -> None:
    tiling = TritonAttention(90).tiling(case.page_size, case.num_heads, case.num_kv_heads)
    inputs = attention_cases.build(case, tiling, np.random.default_rng(0))
    # bfloat16 values are multiplied in float32, so nothing is rounded on the way.
    assert attention_cases.check(case, attention_cases.run_reference, inputs) < 2e-6


@pytest.fixture(scope="module")
def interpreter() -> ModuleType:
    pytest.importorskip("triton", reason="install the gpu-check requirements")
    from tests.models import triton_interpreter

    return triton_interpreter


@pytest.mark.parametrize("case", SMALL_CASES, ids=lambda case: case.name)
def test_the_triton_kernels_pass_the_battery(case: Case, interpreter: ModuleType) -> None:
    attention = TritonAttention(90, SMALL, interpreter.interpret)
    tiling = attention.tiling(case.page_size, case.num_heads, case.num_kv_heads)
    tiling = dataclasses.replace(tiling, tile_rows=TILE_ROWS)
    inputs = attention_cases.build(case, tiling, np.random.default_rng(0))
    attention_cases.check(case, partial(run_eagerly, attention), inputs)
