"""The Llama functions keep to the shapes, dtypes and structure that the step relies on."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.param_loading import export_tensors, flatten, load_params
from models.config import ModelConfig, RopeScaling
from models.ops.attention.dense import dense_attend, dense_attention
from models.ops.rope import apply_rope, rope_angles, rope_frequencies
from models.registry import LLAMA, get_family
from tests.checkpoint.memory_source import MemorySource

CONFIG = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
    attention_bias=True,
    mlp_bias=True,
)
TIED = replace(CONFIG, tie_word_embeddings=True, attention_bias=False, mlp_bias=False)


@pytest.fixture(scope="module")
def params() -> dict:
    return LLAMA.init_params(CONFIG, jax.random.key(0), jnp.float32)


@pytest.mark.parametrize("config", [CONFIG, TIED])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_abstract_params_are_those_of_init(config: ModelConfig, dtype: type) -> None:
    abstract = LLAMA.abstract_params(config, dtype)
    made = jax.eval_shape(lambda key: LLAMA.init_params(config, key, dtype), jax.random.key(1))
    assert jax.tree.structure(abstract) == jax.tree.structure(made)
    for path, leaf in flatten(abstract).items():
        assert leaf.dtype == dtype, path
        assert path.startswith("layers.") == (leaf.shape[0] == config.num_layers), path
    assert ("lm_head" in abstract) == (not config.tie_word_embeddings)


def test_layers_are_initialised_differently_and_repeatably(params: dict) -> None:
    kernels = params["layers"]["mlp"]["up_proj"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])
    again = LLAMA.init_params(CONFIG, jax.random.key(0), jnp.float32)
    jax.tree.map(np.testing.assert_array_equal, params, again)


@pytest.mark.parametrize("config", [CONFIG, TIED])
@pytest.mark.parametrize("convention", ["hf", "gguf"])
def test_name_tables_go_both_ways_bit_for_bit(config: ModelConfig, convention: str) -> None:
    generator = np.random.default_rng(0)
    made = jax.tree.map(
        lambda leaf: generator.normal(size=leaf.shape).astype(leaf.dtype),
        LLAMA.abstract_params(config, jnp.bfloat16),
    )
    table = LLAMA.name_tables[convention](config)
    tensors = dict(export_tensors(made, table))
    loaded = load_params(MemorySource(tensors), table, LLAMA.abstract_params(config, jnp.bfloat16))
    for path, leaf in flatten(loaded).items():
        assert np.asarray(leaf).tobytes() == np.asarray(flatten(made)[path]).tobytes(), path


def test_layers_run_as_one_scan_with_the_cache_in_its_carry(params: dict) -> None:
    def attend(q, k, v, cache, layer_index):
        assert q.shape == (5, 4, 8)
        assert k.shape == v.shape == (5, 2, 8)
        assert layer_index.dtype == jnp.int32
        return q, cache.at[layer_index].set(jnp.sum(k))

    def run(params: dict, x: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        return LLAMA.run_layers(params, CONFIG, x, jnp.arange(5), cache, attend)

    x, cache = jnp.ones((5, 24)), jnp.zeros(3)
    jaxpr = jax.make_jaxpr(run)(params, x, cache).jaxpr
    scans = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert len(scans) == 1
    assert scans[0].params["length"] == CONFIG.num_layers
    assert scans[0].params["num_carry"] == len(scans[0].outvars) == 2
    out, cache = jax.jit(run)(params, x, cache)
    assert out.shape == (5, 24)
    assert np.all(np.asarray(cache) != 0), "each layer gets its own index"


def test_float32_matmuls_ask_for_full_precision(params: dict) -> None:
    def forward(params: dict, token_ids: jax.Array) -> jax.Array:
        x = LLAMA.embed(params, CONFIG, token_ids)
        x, _ = LLAMA.run_layers(params, CONFIG, x, jnp.arange(4), (), dense_attend(CONFIG))
        return LLAMA.logits(params, CONFIG, x)

    text = str(jax.make_jaxpr(forward)(params, jnp.arange(4)))
    assert text.count("dot_general[") == 10
    assert text.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") == 10


def test_bfloat16_params_give_float32_logits_close_to_float32(params: dict) -> None:
    @jax.jit
    def forward(params: dict) -> jax.Array:
        x = LLAMA.embed(params, CONFIG, jnp.arange(6))
        x, _ = LLAMA.run_layers(params, CONFIG, x, jnp.arange(6), (), dense_attend(CONFIG))
        assert x.dtype == params["embed"].dtype
        return LLAMA.logits(params, CONFIG, x)

    low = forward(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params))
    assert low.dtype == jnp.float32
    np.testing.assert_allclose(low, forward(params), atol=0.02)


def test_an_unknown_family_is_refused_with_the_known_ones() -> None:
    assert get_family("llama") is LLAMA
    with pytest.raises(ValueError, match=r"'opt' is not supported; use one of \['falcon'"):
        get_family("opt")


def test_rope_keeps_lengths_and_depends_on_distance_only() -> None:
    q, k = jnp.asarray(np.random.default_rng(0).normal(size=(2, 1, 1, 8)), jnp.float32)

    @jax.jit
    def score(q_position: int, k_position: int) -> jax.Array:
        rotated_q = apply_rope(q, *rope_angles(CONFIG, jnp.int32(q_position)[None]))
        rotated_k = apply_rope(k, *rope_angles(CONFIG, jnp.int32(k_position)[None]))
        return jnp.sum(rotated_q * rotated_k)

    assert float(score(9, 4)) == pytest.approx(float(score(25, 20)), abs=1e-5)
    assert abs(float(score(9, 4) - score(9, 5))) > 1e-3


def test_llama3_scaling_keeps_fast_pairs_and_slows_slow_ones() -> None:
    plain = replace(CONFIG, head_dim=64, rope_theta=500000.0)
    scaled = replace(plain, rope_scaling=RopeScaling("llama3", 32.0, 1.0, 4.0, 8192))
    ratio = rope_frequencies(scaled) / rope_frequencies(plain)
    assert ratio[0] == 1.0
    assert ratio[-1] == pytest.approx(1 / 32)
    assert np.all(np.diff(ratio) <= 0)
    assert np.any((ratio > 1 / 32 + 1e-6) & (ratio < 1))


@pytest.mark.parametrize("sliding_window", [None, 1, 3])
def test_dense_attention_equals_a_plain_loop(sliding_window: int | None) -> None:
    q, k, v = (
        np.random.default_rng(seed).normal(size=(7, heads, 8)).astype(np.float32)
        for seed, heads in enumerate((4, 2, 2))
    )
    out = np.asarray(
        jax.jit(dense_attention, static_argnames="sliding_window")(
            q, k, v, sliding_window=sliding_window
        )
    )
    for row in range(7):
        first = 0 if sliding_window is None else max(0, row - sliding_window + 1)
        for head in range(4):
            keys, values = k[first : row + 1, head // 2], v[first : row + 1, head // 2]
            weights = np.exp(keys @ q[row, head] / np.sqrt(8))
            expected = weights @ values / weights.sum()
            np.testing.assert_allclose(out[row, head], expected, atol=1e-5)
