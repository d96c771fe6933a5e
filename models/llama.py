"""The Llama family (Llama 2 and 3, Mistral, SmolLM2) as pure functions over pytrees.

`DecoderLayer` describes one layer. Its parameters are stacked on a leading axis of L
layers, and `run_layers` scans over them: the compiled step has tens of arguments, not
thousands, and its size does not grow with depth.

Parameters are a nested dict of arrays without empty leaves::

    {"embed": [V, E],
     "layers": {"attention_norm": {"scale": [L, E]},
                "attention": {"q_proj": {"kernel": [L, E, H*D], "bias"?: [L, H*D]},
                              "k_proj", "v_proj": {"kernel": [L, E, K*D], ...},
                              "o_proj": {"kernel": [L, H*D, E], ...}},
                "mlp_norm": {"scale": [L, E]},
                "mlp": {"gate_proj", "up_proj": {"kernel": [L, E, F], ...},
                        "down_proj": {"kernel": [L, F, E], ...}}},
     "final_norm": [E],
     "lm_head": [E, V]}                       # only when the embeddings are not tied
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.ops.linear import Linear, attach_adapters, matmul_precision
from models.ops.norm import rms_norm
from models.ops.rope import apply_rope, rope_angles
from models.training_hooks import NO_HOOKS, Branch, TrainingHooks

Params: TypeAlias = dict[str, Any]
"""Nested dict of arrays, as drawn above."""

Cache = TypeVar("Cache")
Attend: TypeAlias = Callable[
    [jax.Array, jax.Array, jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]
]
"""`attend(q[T, H, D], k[T, K, D], v[T, K, D], cache, layer_index) -> (out[T, H, D], cache)`.

q and k come rotated and unscaled; `layer_index` is an int32 scalar.
"""

INIT_STDDEV = 0.02


class RmsNorm(nnx.Module):
    """`rms_norm` with its scale `[E]`."""

    def __init__(self, size: int, eps: float, *, dtype: DTypeLike) -> None:
        self.scale = nnx.Param(jnp.ones((size,), dtype))
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return rms_norm(x, self.scale[...], self.eps)


class Attention(nnx.Module):
    """The four projections around attention; attention itself is given by the caller."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def linear(in_features: int, out_features: int) -> Linear:
            return Linear(
                in_features,
                out_features,
                use_bias=config.attention_bias,
                dtype=dtype,
                stddev=INIT_STDDEV,
                rngs=rngs,
            )

        self.head_dim = config.head_dim
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, query_size)
        self.k_proj = linear(config.hidden_size, kv_size)
        self.v_proj = linear(config.hidden_size, kv_size)
        self.o_proj = linear(query_size, config.hidden_size)

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`x[T, E]` to `q[T, H, D]`, `k[T, K, D]`, `v[T, K, D]`, not yet rotated."""
        q, k, v = (
            projection(x).reshape(x.shape[0], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def output(self, attended: jax.Array) -> jax.Array:
        """`attended[T, H, D]` to `[T, E]`."""
        return self.o_proj(attended.reshape(attended.shape[0], -1))


class GatedMlp(nnx.Module):
    """`down(silu(gate(x)) * up(x))`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def linear(in_features: int, out_features: int) -> Linear:
            return Linear(
                in_features,
                out_features,
                use_bias=config.mlp_bias,
                dtype=dtype,
                stddev=INIT_STDDEV,
                rngs=rngs,
            )

        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """One decoder layer: normalised attention, then a normalised gated MLP."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = GatedMlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: jax.Array,
        rope: tuple[jax.Array, jax.Array],
        attend: Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Cache]],
        branch_output: Callable[[jax.Array, Branch], jax.Array],
    ) -> tuple[jax.Array, Cache]:
        """Run the layer on `x[T, E]`; `rope` is `(cos, sin)`, each `float32[T, D/2]`.

        `branch_output` is what training does to a branch before it is added to `x`.
        """
        q, k, v = self.attention.project(self.attention_norm(x))
        attended, cache = attend(apply_rope(q, *rope), apply_rope(k, *rope), v)
        attention = self.attention.output(attended.astype(x.dtype))
        x = x + branch_output(attention, "attention")
        return x + branch_output(self.mlp(self.mlp_norm(x)), "mlp"), cache


@lru_cache(maxsize=32)
def _layer_graph(config: ModelConfig) -> nnx.GraphDef[DecoderLayer]:
    """The layer's structure without arrays; the dtype lives in the arrays alone."""
    layer = nnx.eval_shape(lambda: DecoderLayer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    return nnx.split(layer)[0]


def init_params(config: ModelConfig, key: jax.Array, dtype: DTypeLike) -> Params:
    """Random parameters.

    Args:
        config: the model's shape.
        key: PRNG key; the same key gives the same values.
        dtype: dtype of every leaf.
    """
    params: Params = _init_params(config, key, jnp.dtype(dtype))
    return params


# Compiled as one program: the many small random draws would otherwise compile one by one.
@partial(jax.jit, static_argnums=(0, 2))
def _init_params(config: ModelConfig, key: jax.Array, dtype: DTypeLike) -> Params:
    embed_key, head_key, layers_key = jax.random.split(key, 3)

    def normal(normal_key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return (INIT_STDDEV * jax.random.normal(normal_key, shape, jnp.float32)).astype(dtype)

    def init_layer(layer_key: jax.Array) -> Params:
        layer = DecoderLayer(config, dtype=dtype, rngs=nnx.Rngs(layer_key))
        return nnx.to_pure_dict(nnx.state(layer, nnx.Param))

    params: Params = {
        "embed": normal(embed_key, (config.vocab_size, config.hidden_size)),
        "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": jnp.ones((config.hidden_size,), dtype),
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = normal(head_key, (config.hidden_size, config.vocab_size))
    return params


def abstract_params(config: ModelConfig, dtype: DTypeLike) -> Params:
    """The pytree of `init_params` as `jax.ShapeDtypeStruct`, without computing anything."""
    shapes: Params = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    return shapes


def embed(params: Params, config: ModelConfig, token_ids: jax.Array) -> jax.Array:
    """`token_ids int32[T]` to rows `[T, E]`. Ids must be in `0 .. V-1`."""
    del config
    return jnp.take(params["embed"], token_ids, axis=0, mode="clip")


def run_layers(
    params: Params,
    config: ModelConfig,
    x: jax.Array,
    positions: jax.Array,
    cache: Cache,
    attend: Attend[Cache],
    hooks: TrainingHooks = NO_HOOKS,
) -> tuple[jax.Array, Cache]:
    """All L decoder layers as one `lax.scan`.

    Args:
        params: the model's parameters.
        config: the model's shape.
        x: `[T, E]`, rows of `embed`.
        positions: `int32[T]`, each row's position in its sequence.
        cache: any pytree, for example the KV pool. It rides in the scan's carry, where
            XLA updates it in place.
        attend: see `Attend`.
        hooks: what training adds; the default adds nothing.

    Returns:
        `(x [T, E], cache)`.
    """
    graph = _layer_graph(config)
    rope = rope_angles(config, positions)

    adapters = {} if hooks.lora is None else hooks.lora.adapters["layers"]

    def body(
        carry: tuple[jax.Array, Cache], layer_inputs: tuple[Params, Params, jax.Array]
    ) -> tuple[tuple[jax.Array, Cache], tuple[()]]:
        rows, layer_cache = carry
        state, layer_adapters, layer_index = layer_inputs
        layer = nnx.merge(graph, state)
        if hooks.lora is not None:
            attach_adapters(layer, layer_adapters, hooks.lora.scale)
        rows, layer_cache = layer(
            rows,
            rope,
            lambda q, k, v: attend(q, k, v, layer_cache, layer_index),
            lambda out, branch: hooks.branch_output(out, layer_index, branch),
        )
        return (rows, layer_cache), ()

    layer_indices = jnp.arange(config.num_layers, dtype=jnp.int32)
    layers = (params["layers"], adapters, layer_indices)
    (x, cache), _ = lax.scan(hooks.wrap_layer(body), (x, cache), layers)
    return x, cache


def logits_params(config: ModelConfig) -> tuple[str, ...]:
    """The top-level entries of the parameters that `logits` reads."""
    return ("final_norm", "embed" if config.tie_word_embeddings else "lm_head")


def logits(params: Params, config: ModelConfig, x: jax.Array) -> jax.Array:
    """Final norm and LM head: `x [N, E]` to `float32[N, V]`."""
    normed = rms_norm(x, params["final_norm"], config.rms_norm_eps)
    if config.tie_word_embeddings:
        head, head_axes = params["embed"], "ve"
    else:
        head, head_axes = params["lm_head"], "ev"
    return jnp.einsum(
        f"ne,{head_axes}->nv",
        normed,
        head,
        precision=matmul_precision(head.dtype),
        preferred_element_type=jnp.float32,
    )
