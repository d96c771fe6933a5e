"""A small language model: the next character from the 16 before it."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax

from tools.schedule_study.corpus import Corpus
from tools.schedule_study.task import Task

Params = dict[str, jax.Array]

BLOCK = 4096
HELD_OUT_BLOCKS = 20
"""Every 20th block of characters is held out: dictionaries are sorted, so an end would differ."""
NUM_HELD_OUT = 32_768
"""Positions that the held-out loss is the mean of."""


@dataclass(frozen=True)
class CharLmConfig:
    """Embeddings of the context, joined, through two hidden layers; 82 thousand parameters."""

    context: int = 16
    embedding_width: int = 16
    hidden_width: int = 160
    batch_size: int = 128


def char_lm(corpus: Corpus, config: CharLmConfig | None = None) -> Task:
    """The task on `corpus`."""
    config = config or CharLmConfig()
    blocks = corpus.ids[: len(corpus.ids) // BLOCK * BLOCK].reshape(-1, BLOCK)
    is_held_out = np.arange(len(blocks)) % HELD_OUT_BLOCKS == HELD_OUT_BLOCKS - 1
    train = jnp.asarray(blocks[~is_held_out].reshape(-1))
    held_out = blocks[is_held_out].reshape(-1)
    starts = np.random.default_rng(0).integers(0, len(held_out) - config.context, size=NUM_HELD_OUT)
    windows = held_out[starts[:, None] + np.arange(config.context + 1)]

    def draw(key: jax.Array) -> jax.Array:
        first = jax.random.randint(key, (config.batch_size,), 0, len(train) - config.context)
        return train[first[:, None] + jnp.arange(config.context + 1)]

    return Task(
        name=f"character model on {corpus.name}",
        init=lambda key: _init(key, config, len(corpus.alphabet)),
        loss=_loss,
        draw=draw,
        held_out=jnp.asarray(windows, jnp.uint8),
    )


def _init(key: jax.Array, config: CharLmConfig, num_characters: int) -> Params:
    width_in = config.context * config.embedding_width
    shapes = {
        "embedding": (num_characters, config.embedding_width),
        "first": (width_in, config.hidden_width),
        "second": (config.hidden_width, config.hidden_width),
        "output": (config.hidden_width, num_characters),
    }
    biases = {"first_bias": config.hidden_width, "second_bias": config.hidden_width}
    keys = dict(zip(shapes, jax.random.split(key, len(shapes)), strict=True))
    params = {
        name: jax.random.normal(keys[name], shape)
        * (1.0 if name == "embedding" else (2.0 / shape[0]) ** 0.5)
        for name, shape in shapes.items()
    }
    params["output"] = params["output"] * 0.1  # near-uniform predictions at the start
    biases["output_bias"] = num_characters
    return params | {name: jnp.zeros(width) for name, width in biases.items()}


def _loss(params: Params, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats; windows: uint8[B, context + 1]."""
    num_characters = params["embedding"].shape[0]
    # Products with one-hot rows: XLA on the CPU adds up a gather's gradient row by row.
    one_hot = jax.nn.one_hot(windows, num_characters)
    inputs = (one_hot[:, :-1] @ params["embedding"]).reshape(windows.shape[0], -1)
    hidden = jax.nn.relu(inputs @ params["first"] + params["first_bias"])
    hidden = jax.nn.relu(hidden @ params["second"] + params["second_bias"])
    logits = hidden @ params["output"] + params["output_bias"]
    return jnp.mean(optax.softmax_cross_entropy(logits, one_hot[:, -1]))
