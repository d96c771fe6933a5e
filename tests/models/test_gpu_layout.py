"""The layout for GPUs: the same function, and the shapes that programs are compiled for."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.param_loading import flatten
from models import llama
from models.config import ModelConfig
from models.gpu_layout import is_fused, lay_out_for_gpu, shapes_on_gpu
from models.loading import ModelSource, open_model
from models.ops.attention.dense import dense_attend
from models.quantization import quantize_params
from models.registry import get_family

TINY = Path(__file__).parent.parent / "goldens" / "tiny"
TINY_CONFIG = ModelConfig(
    family="llama",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)
VARIANTS = {
    "biases": {"attention.qkv_proj", "mlp.gate_up_proj"},
    "qwen2": {"attention.qkv_proj", "mlp.gate_up_proj"},  # With biases.
    "qwen3_moe": {"attention.qkv_proj"},  # Experts stay as they are.
    "gemma3": {"attention.qkv_proj", "mlp.gate_up_proj"},
    "phi3": {"attention.qkv_proj", "mlp.gate_up_proj"},  # The model has them so.
    "gpt2": {"attention.qkv_proj"},
}


def _logits(source: ModelSource, params: dict, token_ids: np.ndarray) -> np.ndarray:
    family, config = get_family(source.config.family), source.config
    positions = jnp.arange(len(token_ids))
    x = family.embed(params, config, jnp.asarray(token_ids))
    x, _ = family.run_layers(params, config, x, positions, (), dense_attend(config))
    return np.asarray(family.logits(params, config, x))


@pytest.mark.parametrize("variant", VARIANTS)
def test_fused_parameters_give_the_same_logits(variant: str) -> None:
    source = open_model(TINY / variant)
    token_ids = np.arange(3, 20) % source.config.vocab_size
    plain = _logits(source, source.load_params(jnp.float32), token_ids)
    fused = lay_out_for_gpu(source.load_params(jnp.float32))
    paths = {path.rsplit(".", 1)[0] for path in flatten(fused["layers"])}
    assert paths >= VARIANTS[variant]
    assert not paths & {"attention.q_proj", "attention.v_proj"}
    assert is_fused(fused)
    # Sums of the same products; the order in which a matrix product adds them may differ.
    atol = 1e-5 * np.abs(plain).max()
    np.testing.assert_allclose(_logits(source, fused, token_ids), plain, rtol=0, atol=atol)


@pytest.mark.parametrize("weight_format", [None, "int8", "int4"])
def test_shapes_are_those_of_the_fused_parameters(weight_format: str | None) -> None:
    params = llama.init_params(TINY_CONFIG, jax.random.key(0), jnp.float32)
    params = jax.tree.map(np.asarray, params)
    if weight_format is not None:
        params = quantize_params(params, weight_format, lambda _, leaf: jnp.asarray(leaf))
    abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), params)
    shapes = shapes_on_gpu(abstract)
    laid_out = lay_out_for_gpu(params)
    assert jax.tree.structure(shapes) == jax.tree.structure(laid_out)
    for shape, leaf in zip(jax.tree.leaves(shapes), jax.tree.leaves(laid_out), strict=True):
        assert (shape.shape, shape.dtype) == (leaf.shape, leaf.dtype)
