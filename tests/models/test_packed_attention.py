"""Block-wise attention and its gradients against the whole square of scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.ops.attention.packed import BLOCK_ROWS, block_masks, packed_attention

LENGTH = 2 * BLOCK_ROWS + 44
"""Two whole blocks and a short one."""
WINDOW = BLOCK_ROWS + 5


def inputs() -> list[jax.Array]:
    """q, k, v of two rows, and what the output is multiplied with."""
    shapes = [(2, LENGTH, 4, 8), (2, LENGTH, 2, 8), (2, LENGTH, 2, 8), (2, LENGTH, 4, 8)]
    keys = jax.random.split(jax.random.key(0), len(shapes))
    # Large enough that weights are far from uniform.
    return [2.0 * jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def segments() -> np.ndarray:
    """A segment that crosses blocks, and padding behind; the second row is one segment."""
    ids = np.ones((2, LENGTH), np.int32)
    ids[0, 100:270], ids[0, 270:] = 2, 0
    return ids


def whole_square(
    q: jax.Array, k: jax.Array, v: jax.Array, ids: np.ndarray, window: int | None
) -> jax.Array:
    place = np.arange(LENGTH)
    distance = place[:, None] - place[None, :]
    visible = (distance >= 0) & (distance < (LENGTH if window is None else window))
    visible = visible & (ids[:, :, None] == ids[:, None, :])
    k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision="highest") / np.sqrt(8)
    weights = jax.nn.softmax(jnp.where(visible[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v, precision="highest")


@pytest.mark.parametrize("window", [None, WINDOW, "traced"])
def test_output_and_gradients_are_those_of_the_whole_square(window: int | str | None) -> None:
    *qkv, factor = inputs()
    ids = segments()
    width = WINDOW if window == "traced" else window
    masks = block_masks(jnp.asarray(ids), 2)
    given = jnp.int32(WINDOW) if window == "traced" else window

    def blocks(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return packed_attention(q, k, v, masks, sliding_window=given)

    def square(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return whole_square(q, k, v, ids, width)

    def with_gradients(attend):
        return jax.jit(lambda *x: (attend(*x), jax.vjp(attend, *x)[1](factor)))(*qkv)

    for value, expected in zip(
        jax.tree.leaves(with_gradients(blocks)),
        jax.tree.leaves(with_gradients(square)),
        strict=True,
    ):
        np.testing.assert_allclose(value, expected, atol=2e-5 * float(jnp.abs(expected).max()))
