"""The chunked loss against a plain log-softmax, its gradients included."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.cross_entropy import weighted_nll_sum

NUM_ROWS, WIDTH, VOCAB = 13, 8, 37
TARGETS = jnp.asarray(np.random.default_rng(0).integers(0, VOCAB, NUM_ROWS), jnp.int32)
WEIGHTS = jnp.asarray(np.random.default_rng(1).uniform(0, 2, NUM_ROWS), jnp.float32)


def logits(head: dict, x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32) @ head["kernel"].astype(jnp.float32) + head["bias"]


def inputs(dtype) -> tuple[dict, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 3)
    head = {
        "kernel": jax.random.normal(keys[0], (WIDTH, VOCAB)).astype(dtype),
        "bias": jax.random.normal(keys[1], (VOCAB,)),
    }
    return head, (3.0 * jax.random.normal(keys[2], (NUM_ROWS, WIDTH))).astype(dtype)


def plain(head: dict, x: jax.Array) -> jax.Array:
    log_probabilities = jax.nn.log_softmax(logits(head, x))
    return -jnp.sum(WEIGHTS * log_probabilities[jnp.arange(NUM_ROWS), TARGETS])


@pytest.mark.parametrize("rows_in_chunk", [13, 5, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_loss_and_gradients_are_those_of_log_softmax(rows_in_chunk: int, dtype) -> None:
    head, x = inputs(dtype)

    def loss(head, x):
        # Twice: the backward pass must scale what the forward pass prepared.
        return 2.0 * weighted_nll_sum(logits, head, x, TARGETS, WEIGHTS, rows_in_chunk * VOCAB * 4)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(head, x)
    expected, expected_gradients = jax.value_and_grad(plain, argnums=(0, 1))(head, x)
    np.testing.assert_allclose(value, 2.0 * expected, rtol=1e-5)
    np.testing.assert_allclose(loss(head, x), value, rtol=1e-6)
    tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
    for leaf, reference in zip(
        jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        assert leaf.dtype == reference.dtype
        np.testing.assert_allclose(
            leaf.astype(jnp.float32),
            2.0 * reference.astype(jnp.float32),
            atol=tolerance * float(jnp.abs(reference).max()),
        )


def test_chunks_hold_no_more_logits_than_allowed() -> None:
    head, x = inputs(jnp.float32)
    seen = []

    def spied(head, x):
        seen.append(x.shape[0])
        return logits(head, x)

    weighted_nll_sum(spied, head, x, TARGETS, WEIGHTS, 5 * VOCAB * 4)
    assert sorted(seen[1:]) == [3, 5, 5]


def test_huge_logits_stay_finite() -> None:
    head, x = inputs(jnp.float32)
    value, gradient = jax.value_and_grad(
        lambda x: weighted_nll_sum(logits, head, x, TARGETS, WEIGHTS)
    )(1e4 * x)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
