"""Weights in 8 and 4 bits: codes, shapes, and logits within the error of the codes."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.errors import FormatError
from checkpoint.param_loading import flatten, put_on_device, unflatten
from models.config import ModelConfig
from models.ops.attention.dense import dense_attend
from models.ops.quantized import (
    FORMATS,
    INT4_GROUP,
    INT4_LIMIT,
    INT8_LIMIT,
    dequantize,
    quantize,
    quantized_matmul,
)
from models.quantization import check_quantizable, quantize_params, quantized_shapes
from models.registry import get_family

CONFIG = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    attention_bias=True,
)


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_weight_is_off_by_half_a_code_at_most(weight_format: str, dtype: type) -> None:
    generator = np.random.default_rng(0)
    # Columns and groups of very different sizes, one of zeros.
    sizes = 10.0 ** generator.integers(-3, 3, (1, 40)) * np.where(np.arange(40) == 7, 0, 1)
    kernel = (generator.normal(size=(128, 40)) * sizes).astype(dtype)
    codes, scales = quantize(kernel, weight_format)
    back = np.asarray(dequantize(jnp.asarray(codes), jnp.asarray(scales)))
    values = np.asarray(kernel, np.float32)
    groups = values.reshape(1 if weight_format == "int8" else 128 // INT4_GROUP, -1, 40)
    limit = INT8_LIMIT if weight_format == "int8" else INT4_LIMIT
    half_code = np.abs(groups).max(axis=1, keepdims=True) / limit / 2
    errors = np.abs(back.reshape(groups.shape) - groups)
    assert (errors <= half_code * (1 + 1e-5)).all()
    assert errors.max() > 0
    assert (back[:, 7] == 0).all()
    num_bytes = codes.nbytes + scales.nbytes
    assert num_bytes == (128 * 40 + 40 * 4 if weight_format == "int8" else 64 * 40 + 4 * 40 * 4)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_the_product_is_that_of_the_kernel_that_the_codes_stand_for(weight_format: str) -> None:
    generator = np.random.default_rng(1)
    codes, scales = quantize(generator.normal(size=(64, 24)).astype(np.float32), weight_format)
    x = generator.normal(size=(5, 64)).astype(np.float32)
    kernel = np.asarray(dequantize(jnp.asarray(codes), jnp.asarray(scales)), np.float64)
    product = quantized_matmul(jnp.asarray(x), jnp.asarray(codes), jnp.asarray(scales))
    np.testing.assert_allclose(product, x.astype(np.float64) @ kernel, rtol=0, atol=1e-5)
    low = quantized_matmul(jnp.asarray(x, jnp.bfloat16), jnp.asarray(codes), jnp.asarray(scales))
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("weight_format", FORMATS)
def test_logits_are_those_of_the_weights_that_the_codes_stand_for(weight_format: str) -> None:
    family = get_family("llama")
    params = family.init_params(CONFIG, jax.random.key(0), jnp.float32)
    host = jax.tree.map(np.asarray, params)
    quantized = quantize_params(host, weight_format, put_on_device)
    shapes = quantized_shapes(family.abstract_params(CONFIG, jnp.float32), weight_format)
    assert jax.tree.structure(shapes) == jax.tree.structure(quantized)
    for path, leaf in flatten(shapes).items():
        made = flatten(quantized)[path]
        assert (leaf.shape, leaf.dtype) == (made.shape, made.dtype), path

    # The oracle: plain parameters, put together again from the codes.
    leaves = flatten(params)
    for path in [path for path in leaves if path.endswith(".kernel")]:
        name = path.removeprefix("layers.").removesuffix(".kernel")
        scales = flatten(quantized)[f"kernel_scales.{name}.scale"]
        leaves[path] = jax.vmap(dequantize)(flatten(quantized)[path], scales)
    oracle = unflatten(leaves)

    tokens, positions = jnp.arange(12, dtype=jnp.int32), jnp.arange(12, dtype=jnp.int32)
    attend = dense_attend(CONFIG)

    def logits(given):  # type: ignore[no-untyped-def]
        x = family.embed(given, CONFIG, tokens)
        x, _ = family.run_layers(given, CONFIG, x, positions, (), attend)
        return family.logits(given, CONFIG, x)

    expected = np.asarray(jax.jit(logits)(oracle))
    np.testing.assert_allclose(jax.jit(logits)(quantized), expected, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(jax.jit(logits)(params)) - expected).max() > 1e-5


def test_what_does_not_fit_is_refused_by_name() -> None:
    mixture = replace(CONFIG, family="mixtral", num_experts=4, num_experts_per_token=2)
    abstract = get_family("mixtral").abstract_params(mixture, jnp.float32)
    with pytest.raises(FormatError, match="int8 weights are not supported for mixtral"):
        check_quantizable(mixture, abstract, "int8")
    odd = replace(CONFIG, intermediate_size=40)
    abstract = get_family("llama").abstract_params(odd, jnp.float32)
    check_quantizable(odd, abstract, "int8")
    with pytest.raises(
        FormatError, match=r"groups of 32, but layers\.mlp\.down_proj\.kernel has 40"
    ):
        check_quantizable(odd, abstract, "int4")
