"""A bag of embeddings: the mean of a text's word embeddings, through one residual layer.

The cheapest encoder of short texts that learns: good enough on two cores to compare methods of
training. Parameters are a nested dict of arrays::

    {"embed": [V, D], "mlp": {"up": [D, F], "up_bias": [F], "down": [F, D]}}

The residual layer counts for 1 / F and has no bias behind it. Adam moves each number alike, so
without that factor a few steps give all texts the same large summand, and a hinge loss with hard
negatives, which is lower where all vectors are equal than where negatives are nearer than
positives, never leaves that point.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

Params = dict[str, Any]

INITIAL_LENGTH = 0.25
"""Mean length of the first embeddings. Vectors are scaled to length one in the end, so it decides
only how far a step of Adam turns them."""


@dataclass(frozen=True, kw_only=True)
class BagConfig:
    """The encoder's shape.

    Attributes:
        vocab_size: V.
        width: D, of an embedding.
        hidden: F, of the residual layer.
    """

    vocab_size: int
    width: int
    hidden: int

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "hidden"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def init_params(
    config: BagConfig, key: jax.Array, table: npt.NDArray[np.float32] | None = None
) -> Params:
    """Fresh float32 parameters. The residual layer begins by adding nothing.

    Args:
        config: the shape.
        key: of the random ones.
        table: word embeddings to start from, float32[V, at least D]: their D principal components,
            scaled; None: random ones.
    """
    width, hidden = config.width, config.hidden
    embed_key, up_key = jax.random.split(key)
    if table is None:
        embed = jax.random.normal(embed_key, (config.vocab_size, width)) / np.sqrt(width)
        embed = INITIAL_LENGTH * embed
    else:
        embed = jnp.asarray(np.float32(INITIAL_LENGTH) * principal_components(table, width))
    return {
        "embed": embed,
        "mlp": {
            "up": jax.random.normal(up_key, (width, hidden)) / np.sqrt(width),
            "up_bias": jnp.zeros((hidden,)),
            "down": jnp.zeros((hidden, width)),
        },
    }


def principal_components(table: npt.NDArray[np.float32], width: int) -> npt.NDArray[np.float32]:
    """The first `width` principal components of rows, float32[V, width], of mean length one."""
    centred = table.astype(np.float64) - table.mean(axis=0, dtype=np.float64)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    reduced = centred @ vectors[:, ::-1][:, :width]
    return np.asarray(reduced / np.linalg.norm(reduced, axis=1).mean(), np.float32)


def embed_texts(params: Params, token_ids: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """One vector of length one for each text, float32[B, D].

    Args:
        params: see above.
        token_ids: int32[B, T], padded at the end with anything in `0 .. V-1`.
        num_tokens: int32[B], how many of each row count.
    """
    rows = jnp.take(params["embed"], token_ids, axis=0, mode="clip")
    counts = jnp.arange(token_ids.shape[1]) < num_tokens[:, None]
    mean = jnp.where(counts[..., None], rows, 0.0).sum(axis=1)
    mean = mean / jnp.maximum(num_tokens, 1)[:, None]
    mlp = params["mlp"]
    hidden = jax.nn.gelu(mean @ mlp["up"] + mlp["up_bias"])
    vectors: jax.Array = mean + hidden @ mlp["down"] / hidden.shape[-1]
    # Under the root, so that the gradient of a zero vector is finite.
    return vectors / jnp.sqrt(jnp.square(vectors).sum(axis=-1, keepdims=True) + 1e-12)
