"""Memory of a step by XLA's own account: mined labels cost what they should, and no more."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.trainer.shard_gradient import flat_vector_of
from jaxserve.trainer.xc_gradient import ContrastSpec, _contrast, _pull_back
from jaxserve.xc.config import LossConfig
from jaxserve.xc.encoders import EncoderSpec, abstract_params
from models.bag_of_embeddings import BagConfig

WIDTH = 64
ENCODER = EncoderSpec(BagConfig(vocab_size=64, width=WIDTH, hidden=128), max_tokens=32)
PARAMS = abstract_params(ENCODER)


def _bytes(num_points: int, num_extra: int) -> int:
    """Temporaries and arguments of a step's two large programs."""
    flat = flat_vector_of(PARAMS, "matrices")
    spec = ContrastSpec(ENCODER, flat, LossConfig(name="softmax"), 1, num_points)
    rows = 2 * num_points + num_extra
    vectors = jax.ShapeDtypeStruct((1, rows * WIDTH), jnp.float32)
    excluded = jax.ShapeDtypeStruct((num_points, num_points + num_extra), jnp.bool_)
    packed = jax.ShapeDtypeStruct((rows, ENCODER.row_size), jnp.int32)
    cotangents = jax.ShapeDtypeStruct((1, rows, WIDTH), jnp.float32)
    leaf = jax.ShapeDtypeStruct((), jnp.int32)
    total = 0
    for program in (
        _contrast.lower(spec, vectors, excluded),
        _pull_back.lower(spec, PARAMS, packed, cotangents, leaf),
    ):
        found = program.compile().memory_analysis()
        total += found.temp_size_in_bytes + found.argument_size_in_bytes
    return total


def test_a_hard_label_a_point_needs_at_least_a_third_more() -> None:
    assert 1.3 <= _bytes(256, 256) / _bytes(256, 0) <= 2.1
