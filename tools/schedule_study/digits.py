"""Handwritten digits: a small image task on real data."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

from tools.schedule_study.task import Task

NUM_TEST = 360
HIDDEN_WIDTH = 32
BATCH_SIZE = 32

Params = dict[str, jax.Array]


@cache
def digits() -> Task:
    """1437 train and 360 test images of 8 x 8 pixels, two hidden layers; 3466 parameters."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    pixels = jnp.asarray(images[order] / 16.0, jnp.float32)
    classes = jnp.asarray(labels[order], jnp.int32)
    train, test = slice(NUM_TEST, None), slice(0, NUM_TEST)
    whole = (pixels[train], classes[train])

    def draw(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        picked = jax.random.randint(key, (BATCH_SIZE,), 0, len(whole[1]))
        return whole[0][picked], whole[1][picked]

    return Task(
        name="digits",
        init=_init,
        loss=_loss,
        draw=draw,
        held_out=(pixels[test], classes[test]),
        train_set=whole,
    )


def _init(key: jax.Array) -> Params:
    widths = (64, HIDDEN_WIDTH, HIDDEN_WIDTH, 10)
    params = {}
    for layer, (layer_key, ins, outs) in enumerate(
        zip(jax.random.split(key, 3), widths[:-1], widths[1:], strict=True)
    ):
        params[f"w{layer}"] = jax.random.normal(layer_key, (ins, outs)) * (2.0 / ins) ** 0.5
        params[f"b{layer}"] = jnp.zeros(outs)
    return params


def _loss(params: Params, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
    pixels, classes = batch
    hidden = jax.nn.relu(pixels @ params["w0"] + params["b0"])
    hidden = jax.nn.relu(hidden @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, classes))
