"""Properties of the compiled programs themselves."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
import pytest

from jaxserve.engine.compilation import ProgramBuild
from jaxserve.engine.startup import program_spec
from models.config import ModelConfig
from models.ops.attention.kv_quantization import FORMATS
from tests.step.harness import TINY, tiny_settings


def temp_bytes(
    rows: int,
    dtype: str,
    num_pages: int,
    config: ModelConfig = TINY,
    kv_quantization: str | None = None,
) -> int:
    settings = replace(
        tiny_settings(buckets=(rows,), max_num_seqs=1, num_pages=num_pages, config=config),
        dtype=jnp.dtype(dtype),
        kv_quantization=kv_quantization,
    )
    with ProgramBuild(program_spec(settings)) as build:
        return build.result().temp_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 2, 24])
def test_temporaries_do_not_grow_with_the_pool(rows: int, dtype: str) -> None:
    """The donated pool is updated in place, for any number of rows and dtype:
    neither a scatter of one row nor a float conversion copies it."""
    small, large = (temp_bytes(rows, dtype, num_pages) for num_pages in (200, 4000))
    assert large == small


@pytest.mark.long
@pytest.mark.parametrize("name", FORMATS)
def test_no_8_bit_pool_is_copied_either(name: str) -> None:
    small, large = (
        temp_bytes(24, "float32", num_pages, kv_quantization=name) for num_pages in (200, 4000)
    )
    assert large == small


def test_one_kv_head_makes_no_copy_of_the_pool() -> None:
    """Its axis has length 1, so the pool has several layouts that are the same bytes."""
    config = replace(TINY, num_kv_heads=1)
    small, large = (temp_bytes(24, "float32", num_pages, config) for num_pages in (200, 4000))
    assert large == small
