"""One battery for every implementation of attention over pages, against the dense oracle."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import ModuleType

import numpy as np
import pytest

from models.ops.attention.triton_attention import FLOAT32, TritonAttention
from tools import attention_cases
from tools.attention_cases import Case, Sequence
from tools.gpu_attention.step import run_eagerly

SMALL = dataclasses.replace(FLOAT32, decode_block=16, split_keys=16, tile_rows=16, tile_block=16)
"""The interpreter takes its time by the program, so that little is split often."""
TILE_ROWS = 8
CASES = (
    Case("grouped, splits", 4, 2, 32, "bfloat16", (Sequence(90), Sequence(36)), 3),
    Case("one KV head, tiles", 2, 1, 16, "float32", (Sequence(20, 9), Sequence(33, 1, False)), 11),
    # MASKED * scale is rounded up at head dimension 80, and down at 128.
    Case("window, head dim 80", 1, 1, 80, "bfloat16", (Sequence(45, 9), Sequence(50)), 11, 20),
    Case("traced window", 2, 1, 16, "float32", (Sequence(40, 2), Sequence(70)), 4, 9, True),
)


def _inputs(case: Case, attention: TritonAttention) -> attention_cases.Inputs:
    tiling = attention.tiling(case.page_size, case.num_heads, case.num_kv_heads)
    tiling = dataclasses.replace(tiling, tile_rows=TILE_ROWS)
    return attention_cases.build(case, tiling, np.random.default_rng(0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_reference_passes_the_battery(case: Case) -> None:
    inputs = _inputs(case, TritonAttention(90))
    # bfloat16 values are multiplied in float32, so nothing is rounded on the way.
    assert attention_cases.check(case, attention_cases.run_reference, inputs) < 2e-6


@pytest.fixture(scope="module")
def interpreter() -> ModuleType:
    pytest.importorskip("triton", reason="install the gpu-check requirements")
    from tests.models import triton_interpreter

    return triton_interpreter


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_triton_kernels_pass_the_battery(case: Case, interpreter: ModuleType) -> None:
    attention = TritonAttention(90, SMALL, interpreter.interpret)
    attention_cases.check(case, partial(run_eagerly, attention), _inputs(case, attention))
