"""Decoder: a family's pure functions, made from its layer.

A layer's parameters are stacked on a leading axis of L layers, and `run_layers` scans over
them: the compiled step has tens of arguments, not thousands, and its size does not grow with
depth. What differs between layers (window, rotary base) is looked up by the layer's index
inside that one scan.

Parameters are a nested dict of arrays without empty leaves::

    {"embed": [V, E],
     "position_embed": [max_position_embeddings, E],   # only where positions are learned
     "layers": {...: [L, ...]},                        # see the family's file
     "final_norm": {"scale": [E], "bias"?: [E]},
     "lm_head": [E, V],                                # only when embeddings are not tied
     "adapters": {...: [L, ...]}}                      # only beside served weights, see
                                                       # `models.adapter_pool`

Laid out for the native CPU kernels they differ, see `models.native_layout`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Protocol, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from models.adapter_rows import attach_row_adapters, pool_rows
from models.config import ModelConfig
from models.gpu_layout import fuse_layer, is_fused
from models.layers import INIT_STDDEV, BranchOutput, LayerAttend
from models.ops.linear import (
    attach_adapters,
    attach_packed,
    attach_scales,
    attach_shard,
    drop_kernels,
)
from models.ops.norm import LayerNorm, RmsNorm, ZeroCentredRmsNorm
from models.ops.precision import matmul_precision
from models.ops.rope import Rope, layer_rope
from models.ops.tensor_shard import TensorShard
from models.training_hooks import NO_HOOKS, TrainingHooks

Params: TypeAlias = dict[str, Any]
"""Nested dict of arrays, as drawn above."""

Cache = TypeVar("Cache")
Attend: TypeAlias = Callable[
    [jax.Array, jax.Array, jax.Array, Cache, jax.Array], tuple[jax.Array, Cache]
]
"""`attend(q[T, H, D], k[T, K, D], v[T, K, D], cache, layer_index) -> (out[T, H, D], cache)`.

q and k come rotated and unscaled; `layer_index` is an int32 scalar, by which `layer_window`
says what the layer sees.
"""

Norm: TypeAlias = type[RmsNorm] | type[ZeroCentredRmsNorm] | type[LayerNorm]


class Layer(Protocol):
    """One decoder layer."""

    def __call__(
        self, x: jax.Array, rope: Rope, attend: LayerAttend[Cache], branch_output: BranchOutput
    ) -> tuple[jax.Array, Cache]:
        """Run the layer on `x[T, E]`; the result has its shape and dtype.

        `branch_output` is what training does to a branch before it is added to `x`.
        """
        ...


@dataclass(frozen=True, slots=True)
class Decoder:
    """The functions that `models.registry.ModelFamily` lists."""

    layer: type[nnx.Module]
    """A `Layer`, made as `layer(config, dtype=..., rngs=...)`."""
    norm: Norm
    """The norm before the head."""
    scales_embedding: bool = False
    """Whether embeddings are multiplied by the square root of E."""
    learns_positions: bool = False
    """Whether a learned row is added for each position, instead of rotation."""

    def init_params(self, config: ModelConfig, key: jax.Array, dtype: DTypeLike) -> Params:
        """Random parameters.

        Args:
            config: the model's shape.
            key: PRNG key; the same key gives the same values.
            dtype: dtype of every leaf.
        """
        params: Params = _init_params(self, config, key, jnp.dtype(dtype))
        return params

    def abstract_params(self, config: ModelConfig, dtype: DTypeLike) -> Params:
        """The pytree of `init_params` as `jax.ShapeDtypeStruct`, without computing anything."""
        shapes: Params = jax.eval_shape(lambda: self.init_params(config, jax.random.key(0), dtype))
        return shapes

    def embed(
        self,
        params: Params,
        config: ModelConfig,
        token_ids: jax.Array,
        shard: TensorShard | None = None,
    ) -> jax.Array:
        """`token_ids int32[T]` to rows `[T, E]`. Ids must be in `0 .. V-1`.

        With `shard`, this device holds its part of the table's rows, see `run_layers`.
        """
        table = params["embed"]
        if shard is None:
            rows = jnp.take(table, token_ids, axis=0, mode="clip")
        else:
            own_ids = token_ids - shard.index() * table.shape[0]
            is_held = (own_ids >= 0) & (own_ids < table.shape[0])
            held = jnp.take(table, own_ids, axis=0, mode="clip")
            rows = shard.sum(jnp.where(is_held[:, None], held, jnp.zeros_like(held)))
        if self.scales_embedding:
            # Rounded to the dtype first, as the models were trained.
            rows = rows * jnp.asarray(math.sqrt(config.hidden_size), rows.dtype)
        return rows

    def run_layers(
        self,
        params: Params,
        config: ModelConfig,
        x: jax.Array,
        positions: jax.Array,
        cache: Cache,
        attend: Attend[Cache],
        hooks: TrainingHooks = NO_HOOKS,
        shard: TensorShard | None = None,
        first_layer: int | jax.Array = 0,
        num_live: jax.Array | None = None,
        adapter_of_row: jax.Array | None = None,
    ) -> tuple[jax.Array, Cache]:
        """The decoder layers in `params`, usually all L, as one `lax.scan`.

        Args:
            params: the model's parameters, quantised (`models.quantization`) or not.
            config: the model's shape; with `shard`, that of this device's part of a layer
                (`models.sharding.ModelSharding.local_config`).
            x: `[T, E]`, rows of `embed`.
            positions: `int32[T]`, each row's position in its sequence.
            cache: any pytree, for example the KV pool. It rides in the scan's carry, where
                XLA updates it in place.
            attend: see `Attend`.
            hooks: what training adds; the default adds nothing.
            shard: this device's place among those that hold parts of each layer, inside
                `shard_map`. `x` and the result are whole on each of them.
            first_layer: index in the model of the first layer in `params`, which `attend` and
                all that differs between layers go by; not 0 in a later stage of a pipeline.
            num_live: int32 scalar: rows from here on are padding, and packed kernels spare
                themselves their products. None: there is no padding.
            adapter_of_row: `int32[T]`, which adapter of the pool in `params["adapters"]`
                (`models.adapter_pool`) each row gets, from 1 on; 0 is none. None: no row gets one.

        Returns:
            `(x [T, E], cache)`.
        """
        packed = params.get("packed_kernels", {})
        graph = _layer_graph(self, config, is_fused(params), bool(packed))
        rope_of = layer_rope(config, positions)
        if self.learns_positions:
            placed = x + jnp.take(params["position_embed"], positions, axis=0, mode="clip")
            x = jnp.where(first_layer == 0, placed, x)

        adapters = {} if hooks.lora is None else hooks.lora.adapters["layers"]
        pool = {} if adapter_of_row is None else params["adapters"]
        adapter_rows = None if adapter_of_row is None else pool_rows(pool, adapter_of_row)
        scales = params.get("kernel_scales", {})

        def body(
            carry: tuple[jax.Array, Cache],
            layer_inputs: tuple[Params, Params, Params, Params, jax.Array],
        ) -> tuple[tuple[jax.Array, Cache], tuple[()]]:
            rows, layer_cache = carry
            state, layer_scales, layer_adapters, layer_pool, layer_index = layer_inputs
            layer: Any = nnx.merge(graph, state)
            attach_scales(layer, layer_scales)
            # The packed kernels stay whole: to slice a layer's out would copy them.
            attach_packed(layer, packed, layer_index - first_layer, num_live)
            if shard is not None:
                attach_shard(layer, shard)
            if adapter_rows is not None:
                attach_row_adapters(layer, layer_pool, adapter_rows)
            if hooks.lora is not None:
                attach_adapters(layer, layer_adapters, hooks.lora.scale)
            rows, layer_cache = layer(
                rows,
                rope_of(layer_index),
                lambda q, k, v: attend(q, k, v, layer_cache, layer_index),
                lambda out, branch: hooks.branch_output(out, layer_index, branch),
            )
            return (rows, layer_cache), ()

        num_layers = jax.tree.leaves(params["layers"])[0].shape[0]
        layer_indices = first_layer + jnp.arange(num_layers, dtype=jnp.int32)
        layers = (params["layers"], scales, adapters, pool, layer_indices)
        (x, cache), _ = lax.scan(hooks.wrap_layer(body), (x, cache), layers)
        return x, cache

    def logits_params(self, config: ModelConfig) -> tuple[str, ...]:
        """The top-level entries of the parameters that `logits` reads."""
        return ("final_norm", "embed" if config.tie_word_embeddings else "lm_head")

    def logits(
        self,
        params: Params,
        config: ModelConfig,
        x: jax.Array,
        shard: TensorShard | None = None,
        num_live: jax.Array | None = None,
    ) -> jax.Array:
        """Final norm and LM head: `x [N, E]` to `float32[N, V]`.

        With `shard`, this device holds its part of the head's V, see `run_layers`; the logits
        are whole on each device. `num_live`: see `run_layers`.
        """
        norm: Any = nnx.merge(_norm_graph(self, config), params["final_norm"])
        if "packed_head" in params:
            product: jax.Array = params["packed_head"].multiply(norm(x), 0, num_live, jnp.float32)
            return product
        if config.tie_word_embeddings:
            head, head_axes = params["embed"], "ve"
        else:
            head, head_axes = params["lm_head"], "ev"
        logits = jnp.einsum(
            f"ne,{head_axes}->nv",
            norm(x),
            head,
            precision=matmul_precision(head.dtype),
            preferred_element_type=jnp.float32,
        )
        # The vocabulary is padded to a multiple of the devices.
        return logits if shard is None else shard.gather(logits)[:, : config.vocab_size]

    def make_layer(self, config: ModelConfig, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """One layer with initial values."""
        make: Callable[..., nnx.Module] = self.layer
        return make(config, dtype=dtype, rngs=rngs)

    def make_norm(self, config: ModelConfig, dtype: DTypeLike) -> nnx.Module:
        """The norm before the head, with initial values."""
        return self.norm(config.hidden_size, config.rms_norm_eps, dtype=dtype)


@lru_cache(maxsize=32)
def _layer_graph(
    decoder: Decoder, config: ModelConfig, fused: bool, packed: bool
) -> nnx.GraphDef[nnx.Module]:
    """The layer's structure without arrays; the dtype lives in the arrays alone."""

    def make_layer() -> nnx.Module:
        layer = decoder.make_layer(config, jnp.float32, nnx.Rngs(0))
        if fused:
            fuse_layer(layer)
        if packed:
            drop_kernels(layer)
        return layer

    return nnx.split(nnx.eval_shape(make_layer))[0]


@lru_cache(maxsize=32)
def _norm_graph(decoder: Decoder, config: ModelConfig) -> nnx.GraphDef[nnx.Module]:
    return nnx.split(nnx.eval_shape(lambda: decoder.make_norm(config, jnp.float32)))[0]


# Compiled as one program: the many small random draws would otherwise compile one by one.
@partial(jax.jit, static_argnums=(0, 1, 3))
def _init_params(decoder: Decoder, config: ModelConfig, key: jax.Array, dtype: DTypeLike) -> Params:
    embed_key, head_key, layers_key = jax.random.split(key, 3)

    def normal(normal_key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        return (INIT_STDDEV * jax.random.normal(normal_key, shape, jnp.float32)).astype(dtype)

    def init_layer(layer_key: jax.Array) -> Params:
        layer = decoder.make_layer(config, dtype, nnx.Rngs(layer_key))
        return nnx.to_pure_dict(nnx.state(layer, nnx.Param))

    params: Params = {
        "embed": normal(embed_key, (config.vocab_size, config.hidden_size)),
        "layers": jax.vmap(init_layer)(jax.random.split(layers_key, config.num_layers)),
        "final_norm": nnx.to_pure_dict(nnx.state(decoder.make_norm(config, dtype), nnx.Param)),
    }
    if not config.tie_word_embeddings:
        params["lm_head"] = normal(head_key, (config.hidden_size, config.vocab_size))
    if decoder.learns_positions:
        shape = (config.max_position_embeddings, config.hidden_size)
        params["position_embed"] = normal(jax.random.fold_in(embed_key, 1), shape)
    return params
