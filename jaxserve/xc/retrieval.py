"""The labels that score highest for each text, by looking at all of them on the device.

Exact, in blocks: memory is a block of texts times a block of labels, whatever the number of labels.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

QUERY_BLOCK = 512
LABEL_BLOCK = 1 << 15


@partial(jax.jit, static_argnames=("k", "label_block"))
def top_labels(
    queries: jax.Array, labels: jax.Array, *, k: int, label_block: int = LABEL_BLOCK
) -> tuple[jax.Array, jax.Array]:
    """The k largest inner products of each query. Of equal ones the smaller id comes first.

    Args:
        queries: float32[Q, D].
        labels: float32[L, D].
        k: how many; at most L.
        label_block: labels that are scored at once.

    Returns:
        Scores float32[Q, k] and ids int32[Q, k], best first.
    """
    num_labels = labels.shape[0]
    if k > num_labels:
        raise ValueError(f"k is {k}, but there are only {num_labels} labels")
    block = min(label_block, num_labels)
    if block == num_labels:
        scores, ids = lax.top_k(queries @ labels.T, k)
        return scores, ids.astype(jnp.int32)
    num_blocks = -(-num_labels // block)

    def merge(
        best: tuple[jax.Array, jax.Array], number: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], None]:
        first = number * block
        # The last block is moved back to end with the labels; those seen before do not count.
        start = jnp.minimum(first, num_labels - block)
        ids = start + jnp.arange(block, dtype=jnp.int32)
        scores = queries @ lax.dynamic_slice_in_dim(labels, start, block).T
        scores = jnp.where(ids >= first, scores, -jnp.inf)
        # What was found before stands in front: its ids are smaller.
        all_scores = jnp.concatenate([best[0], scores], axis=1)
        all_ids = jnp.concatenate([best[1], jnp.broadcast_to(ids, scores.shape)], axis=1)
        kept, places = lax.top_k(all_scores, k)
        return (kept, jnp.take_along_axis(all_ids, places, axis=1)), None

    empty = (
        jnp.full((queries.shape[0], k), -jnp.inf, jnp.float32),
        jnp.full((queries.shape[0], k), -1, jnp.int32),
    )
    (scores, ids), _ = lax.scan(merge, empty, jnp.arange(num_blocks, dtype=jnp.int32))
    return scores, ids


def retrieve(
    queries: npt.NDArray[np.float32] | jax.Array,
    labels: npt.NDArray[np.float32] | jax.Array,
    k: int,
    query_block: int = QUERY_BLOCK,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """`top_labels` for any number of queries, by blocks of one shape: scores and ids, [N, k]."""
    labels = jnp.asarray(labels)
    num_queries = len(queries)
    scores = np.empty((num_queries, k), np.float32)
    ids = np.empty((num_queries, k), np.int32)
    for first in range(0, num_queries, query_block):
        part = np.asarray(queries[first : first + query_block], np.float32)
        padded = np.zeros((query_block, part.shape[1]), np.float32)
        padded[: len(part)] = part
        block_scores, block_ids = top_labels(padded, labels, k=k)
        scores[first : first + len(part)] = np.asarray(block_scores)[: len(part)]
        ids[first : first + len(part)] = np.asarray(block_ids)[: len(part)]
    return scores, ids
