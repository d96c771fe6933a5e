"""What a step of an encoder needs of the device's memory, by XLA's own account. Nothing is run."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxserve.trainer.shard_gradient import flat_vector_of
from jaxserve.trainer.xc_gradient import ContrastSpec, _contrast, _pull_back
from jaxserve.xc.config import LossConfig
from jaxserve.xc.encoders import EncoderSpec, abstract_params


def step_bytes(encoder: EncoderSpec, loss: LossConfig, num_points: int, num_extra: int) -> int:
    """Temporaries and arguments of a step's two large programs: the contrast of all embeddings, and
    the gradient of one micro-batch that is the whole batch.

    Args:
        encoder: its shape.
        loss: which.
        num_points: S, and as many positives.
        num_extra: labels that join as negatives.
    """
    params = abstract_params(encoder)
    spec = ContrastSpec(encoder, flat_vector_of(params, "matrices"), loss, 1, num_points)
    rows = 2 * num_points + num_extra
    vectors = jax.ShapeDtypeStruct((1, rows * encoder.width), jnp.float32)
    excluded = jax.ShapeDtypeStruct((num_points, num_points + num_extra), jnp.bool_)
    packed = jax.ShapeDtypeStruct((rows, encoder.row_size), jnp.int32)
    cotangents = jax.ShapeDtypeStruct((1, rows, encoder.width), jnp.float32)
    leaf = jax.ShapeDtypeStruct((), jnp.int32)
    total = 0
    for lowered in (
        _contrast.lower(spec, vectors, excluded),
        _pull_back.lower(spec, params, packed, cotangents, leaf),
    ):
        found = lowered.compile().memory_analysis()
        assert found is not None
        total += found.temp_size_in_bytes + found.argument_size_in_bytes
    return total
