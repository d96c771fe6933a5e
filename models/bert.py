"""BERT-type encoders (Devlin et al., 2018), such as all-MiniLM-L6-v2: text to one vector.

Each layer normalises after it has added, every position sees every other of its text, and
positions are learned. A text's embedding is the mean of its rows, scaled to length one
(Reimers and Gurevych, "Sentence-BERT", 2019).

Parameters are a nested dict of arrays::

    {"embed": [V, E], "position_embed": [max_position_embeddings, E], "type_embed": [2, E],
     "embed_norm": {"scale": [E], "bias": [E]},
     "layers": {"attention": {"q_proj", "k_proj", "v_proj", "o_proj": {"kernel": [L, E, E],
                                                                       "bias": [L, E]}},
                "attention_norm", "mlp_norm": {"scale": [L, E], "bias": [L, E]},
                "mlp": {"up_proj": {"kernel": [L, E, F], "bias": [L, F]},
                        "down_proj": {"kernel": [L, F, E], "bias": [L, E]}}}}
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.decoder import Params
from models.layers import INIT_STDDEV, Attention, Cache, LayerAttend, Mlp
from models.ops.attention.bidirectional import bidirectional_attention
from models.ops.norm import LayerNorm, layer_norm
from models.ops.rope import rope_angles

NUM_TYPES = 2
"""First and second text of a pair; a single text is all of the first."""


class BertLayer(nnx.Module):
    """Attention and an MLP, each added to its input and then normalised."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention = Attention(config, dtype=dtype, rngs=rngs, output_bias=True)
        self.attention_norm = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

    def __call__(
        self, x: jax.Array, rope: tuple[jax.Array, jax.Array], attend: LayerAttend[Cache]
    ) -> jax.Array:
        """Run the layer on `x [rows, E]`."""
        attended, _ = self.attention(x, rope, attend)
        x = self.attention_norm(x + attended)
        return self.mlp_norm(x + self.mlp(x))


def init_params(config: ModelConfig, key: jax.Array, dtype: DTypeLike) -> Params:
    """Random parameters; the same key gives the same values."""
    params: Params = _init_params(config, key, jnp.dtype(dtype))
    return params


def abstract_params(config: ModelConfig, dtype: DTypeLike) -> Params:
    """The pytree of `init_params` as `jax.ShapeDtypeStruct`, without computing anything."""
    shapes: Params = jax.eval_shape(lambda: init_params(config, jax.random.key(0), dtype))
    return shapes


def encode(
    params: Params, config: ModelConfig, token_ids: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    """The last layer's rows.

    Args:
        params: the model's parameters.
        config: the model's shape.
        token_ids: `int32[B, T]`, padded at the end with anything in `0 .. V-1`; T is at most
            `max_position_embeddings`.
        num_tokens: `int32[B]`, how many of each row count.

    Returns:
        `[B, T, E]`; rows of padding mean nothing.
    """
    batch, length = token_ids.shape
    if length > config.max_position_embeddings:
        raise ValueError(
            f"token_ids has {length} positions, but the model has {config.max_position_embeddings}"
        )
    x = jnp.take(params["embed"], token_ids, axis=0, mode="clip")
    x = x + params["position_embed"][:length] + params["type_embed"][0]
    norm = params["embed_norm"]
    x = layer_norm(x, norm["scale"], norm["bias"], config.rms_norm_eps)
    rope = rope_angles(config, jnp.zeros(batch * length, jnp.int32))
    graph = _layer_graph(config)

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, tuple[()]]:
        q, k, v = (rows.reshape(batch, length, *rows.shape[1:]) for rows in (q, k, v))
        out = bidirectional_attention(q, k, v, num_tokens)
        return out.reshape(batch * length, *out.shape[2:]), ()

    def body(rows: jax.Array, layer_params: Params) -> tuple[jax.Array, tuple[()]]:
        layer: Any = nnx.merge(graph, layer_params)
        return layer(rows, rope, attend), ()

    rows, _ = lax.scan(body, x.reshape(batch * length, -1), params["layers"])
    return rows.reshape(batch, length, -1)


def embed_texts(
    params: Params,
    config: ModelConfig,
    token_ids: jax.Array,
    num_tokens: jax.Array,
    *,
    normalize: bool = True,
) -> jax.Array:
    """One vector for each text: `float32[B, E]`, of length one if `normalize`.

    The other arguments are those of `encode`.
    """
    rows = encode(params, config, token_ids, num_tokens).astype(jnp.float32)
    counts = jnp.arange(token_ids.shape[1]) < num_tokens[:, None]
    total = jnp.where(counts[..., None], rows, 0.0).sum(axis=1)
    mean = total / jnp.maximum(num_tokens, 1)[:, None]
    if not normalize:
        return mean
    norm = jnp.sqrt(jnp.square(mean).sum(axis=-1, keepdims=True))
    return mean / jnp.maximum(norm, 1e-12)


@lru_cache(maxsize=32)
def _layer_graph(config: ModelConfig) -> nnx.GraphDef[BertLayer]:
    layer = nnx.eval_shape(lambda: BertLayer(config, dtype=jnp.float32, rngs=nnx.Rngs(0)))
    return nnx.split(layer)[0]


@partial(jax.jit, static_argnums=(0, 2))
def _init_params(config: ModelConfig, key: jax.Array, dtype: DTypeLike) -> Params:
    width = config.hidden_size

    def normal(number: int, rows: int) -> jax.Array:
        values = jax.random.normal(jax.random.fold_in(key, number), (rows, width), jnp.float32)
        return (INIT_STDDEV * values).astype(dtype)

    def init_layer(layer_key: jax.Array) -> Params:
        layer = BertLayer(config, dtype=dtype, rngs=nnx.Rngs(layer_key))
        return nnx.to_pure_dict(nnx.state(layer, nnx.Param))

    layer_keys = jax.random.split(jax.random.fold_in(key, 3), config.num_layers)
    return {
        "embed": normal(0, config.vocab_size),
        "position_embed": normal(1, config.max_position_embeddings),
        "type_embed": normal(2, NUM_TYPES),
        "embed_norm": {"scale": jnp.ones((width,), dtype), "bias": jnp.zeros((width,), dtype)},
        "layers": jax.vmap(init_layer)(layer_keys),
    }
