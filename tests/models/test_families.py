"""What the step, the trainer and the name tables rely on, for every family."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from checkpoint.param_loading import export_tensors, flatten, load_params
from models.config import ModelConfig
from models.lora import Lora, LoraConfig, init_adapters
from models.ops.attention.dense import dense_attend
from models.registry import FAMILIES
from models.training_hooks import TrainingHooks
from tests.checkpoint.memory_source import MemorySource


def small(family: str, **changes: object) -> ModelConfig:
    """A config of three layers whose sizes are all different."""
    fields: dict[str, object] = {
        "vocab_size": 61,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    }
    return ModelConfig(family=family, **(fields | changes))  # type: ignore[arg-type]


CONFIGS = {
    "llama": small("llama", attention_bias=True, mlp_bias=True),
    "llama tied": small("llama", tie_word_embeddings=True),
    "qwen2": small("qwen2", attention_bias=True, layer_windows=(None, 4, 4)),
    "qwen3": small("qwen3"),
    "qwen3 biases": small("qwen3", attention_bias=True),
    "gemma3": small(
        "gemma3",
        layer_windows=(5, 5, None),
        rope_local_theta=500.0,
        tie_word_embeddings=True,
        hidden_act="gelu_tanh",
    ),
    "phi3": small("phi3", rotary_dim=6),
    "gpt2": small(
        "gpt2",
        num_kv_heads=4,
        rotary_dim=0,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        hidden_act="gelu_tanh",
    ),
    "falcon": small("falcon", num_kv_heads=1, hidden_act="gelu"),
    "falcon two norms": small("falcon", num_layer_norms=2, attention_bias=True, mlp_bias=True),
    "mixtral": small("mixtral", num_experts=5, num_experts_per_token=2),
    "qwen3_moe": small("qwen3_moe", num_experts=4, num_experts_per_token=3),
}
NAMES = sorted(CONFIGS)


def test_every_family_is_here() -> None:
    assert {config.family for config in CONFIGS.values()} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_params_have_one_dtype_and_layers_are_stacked(name: str) -> None:
    config = CONFIGS[name]
    abstract = FAMILIES[config.family].abstract_params(config, jnp.bfloat16)
    for path, leaf in flatten(abstract).items():
        assert leaf.dtype == jnp.bfloat16, path
        assert path.startswith("layers.") == (leaf.shape[0] == config.num_layers), path
    assert ("lm_head" in abstract) == (not config.tie_word_embeddings)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("convention", ["hf", "gguf"])
def test_name_tables_go_both_ways_bit_for_bit(name: str, convention: str) -> None:
    config = CONFIGS[name]
    family = FAMILIES[config.family]
    abstract = family.abstract_params(config, jnp.bfloat16)
    generator = np.random.default_rng(0)
    made = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(leaf.dtype), abstract)
    table = family.name_tables[convention](config)
    tensors = list(export_tensors(made, table))
    assert len({tensor_name for tensor_name, _ in tensors}) == len(tensors)
    loaded = flatten(load_params(MemorySource(dict(tensors)), table, abstract))
    for path, leaf in flatten(made).items():
        assert np.asarray(loaded[path]).tobytes() == leaf.tobytes(), path


@pytest.mark.parametrize("name", NAMES)
def test_layers_run_as_one_scan_with_the_cache_in_its_carry(name: str) -> None:
    config = CONFIGS[name]
    family = FAMILIES[config.family]

    def attend(q, k, v, cache, layer_index):
        assert q.shape == (5, config.num_heads, config.head_dim)
        assert k.shape == v.shape == (5, config.num_kv_heads, config.head_dim)
        assert layer_index.dtype == jnp.int32
        return q, cache.at[layer_index].set(jnp.sum(v))

    def run(params: dict, x: jax.Array, cache: jax.Array) -> tuple[jax.Array, jax.Array]:
        return family.run_layers(params, config, x, jnp.arange(5), cache, attend)

    abstract = family.abstract_params(config, jnp.float32)
    jaxpr = jax.make_jaxpr(run)(abstract, jnp.ones((5, 24)), jnp.zeros(3)).jaxpr
    (scan,) = [equation for equation in jaxpr.eqns if equation.primitive.name == "scan"]
    assert scan.params["length"] == config.num_layers
    assert scan.params["num_carry"] == len(scan.outvars) == 2


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_bfloat16_until_the_logits(name: str) -> None:
    config = CONFIGS[name]
    family = FAMILIES[config.family]

    def forward(params: dict) -> jax.Array:
        x = family.embed(params, config, jnp.arange(6))
        assert x.dtype == jnp.bfloat16
        x, _ = family.run_layers(params, config, x, jnp.arange(6), (), dense_attend(config))
        assert x.dtype == jnp.bfloat16
        return family.logits(params, config, x)

    logits = jax.eval_shape(forward, family.abstract_params(config, jnp.bfloat16))
    assert (logits.shape, logits.dtype) == ((6, config.vocab_size), jnp.float32)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_go_beside_the_projections_of_every_family(name: str) -> None:
    config = CONFIGS[name]
    family = FAMILIES[config.family]
    abstract = family.abstract_params(config, jnp.float32)
    adapters = jax.eval_shape(
        lambda key: init_adapters(abstract, LoraConfig(rank=2, alpha=4.0), key), jax.random.key(0)
    )
    projections = {path.rpartition(".")[0] for path in flatten(adapters)}
    kernels = {
        path.removesuffix(".kernel")
        for path, leaf in flatten(abstract).items()
        if path.endswith(".kernel") and "router" not in path and leaf.ndim == 3
    }
    assert projections == kernels != set()

    def run(params: dict, adapters: dict, x: jax.Array) -> jax.Array:
        hooks = TrainingHooks(lora=Lora(adapters, 2.0))
        attend = dense_attend(config)
        return family.run_layers(params, config, x, jnp.arange(5), (), attend, hooks)[0]

    assert jax.eval_shape(run, abstract, adapters, jnp.ones((5, 24))).shape == (5, 24)


@pytest.mark.parametrize(
    ("windows", "message"),
    [
        ((3, 3, 3), "not all the same"),
        ((3, None), "must name 3 windows"),
    ],
)
def test_layer_windows_must_make_sense(windows: tuple[int | None, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small("llama", layer_windows=windows)
    with pytest.raises(ValueError, match="both set"):
        small("llama", layer_windows=(3, None, 3), sliding_window=3)
