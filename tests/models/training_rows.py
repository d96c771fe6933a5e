"""Rows for tests of the training forward, and the loss that they should have."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig
from models.ops.attention.dense import dense_attend
from models.registry import get_family
from models.training import TrainRows

TINY = ModelConfig(
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


def pack(segments: list[list[np.ndarray]], length: int, seed: int = 0) -> TrainRows:
    """Rows of `length`, each with the given segments (tokens `int32[n + 1]` that predict n)
    one after another and padding behind; weights are random, 0 for padding."""
    generator = np.random.default_rng(seed)
    shape = (len(segments), length)
    rows = TrainRows(
        inputs=np.zeros(shape, np.int32),
        targets=np.zeros(shape, np.int32),
        weights=np.zeros(shape, np.float32),
        segment_ids=np.zeros(shape, np.int32),
        positions=np.zeros(shape, np.int32),
    )
    for row, parts in enumerate(segments):
        start = 0
        for number, tokens in enumerate(parts, start=1):
            place = (row, slice(start, start + len(tokens) - 1))
            rows.inputs[place] = tokens[:-1]
            rows.targets[place] = tokens[1:]
            rows.weights[place] = generator.uniform(0.5, 1.5, len(tokens) - 1)
            rows.segment_ids[place] = number
            rows.positions[place] = np.arange(len(tokens) - 1)
            start += len(tokens) - 1
    return rows


def random_rows(config: ModelConfig, lengths: list[list[int]], length: int) -> TrainRows:
    """`pack` of random tokens; `lengths[row]` are the segments' numbers of targets."""
    generator = np.random.default_rng(len(lengths))
    return pack(
        [[generator.integers(0, config.vocab_size, n + 1) for n in parts] for parts in lengths],
        length,
    )


def naive_loss(params: dict, config: ModelConfig, rows: TrainRows) -> jax.Array:
    """Each segment alone through the serving layers, all its logits, a plain log-softmax."""
    family = get_family(config.family)
    alone = _segments_alone(rows)

    def one_loss(inputs: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        x = family.embed(params, config, inputs)
        positions = jnp.arange(inputs.shape[0], dtype=jnp.int32)
        attend = dense_attend(config)
        x, _ = family.run_layers(params, config, x, positions, (), attend)
        log_probabilities = jax.nn.log_softmax(family.logits(params, config, x))
        return -jnp.sum(weights * log_probabilities[jnp.arange(inputs.shape[0]), targets])

    return jnp.sum(jax.vmap(one_loss)(alone.inputs, alone.targets, alone.weights))


def _segments_alone(rows: TrainRows) -> TrainRows:
    """Every segment at the start of a row of its own; causal layers cannot see what follows."""
    parts = [
        [np.zeros_like(field[0]) for field in rows]
        for row in range(len(rows.inputs))
        for _ in range(rows.segment_ids[row].max())
    ]
    made = iter(parts)
    for row in range(len(rows.inputs)):
        for segment in range(1, rows.segment_ids[row].max() + 1):
            here = np.flatnonzero(rows.segment_ids[row] == segment)
            for target, source in zip(next(made), rows, strict=True):
                target[: len(here)] = source[row, here]
    return TrainRows(*(np.stack(field) for field in zip(*parts, strict=True)))
