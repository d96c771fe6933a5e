"""Balanced clusters of points, by splitting in half again and again (NGAME, section 4.2 and code).

A split runs 2-means on the sphere: points are ordered by how much nearer they are to one centre
than to the other, and the first half goes to it, until the mean similarity stops to grow. All
groups of a level are split by one program: they have m or m - 1 points, so a matrix holds them.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax import lax

MAX_ROUNDS = 10
MIN_GAIN = 1e-4

Int32Array = npt.NDArray[np.int32]
Int64Array = npt.NDArray[np.int64]


def num_levels(num_points: int, cluster_size: int) -> int:
    """How often to split so that clusters have about `cluster_size` points, each at least one.

    2**levels is the power of two next to N / C, by ratio; so sizes are within a factor of
    sqrt(2) of C as long as N is at least C.
    """
    if num_points < 1 or cluster_size < 1:
        raise ValueError("there must be at least one point, and one point a cluster")
    wanted = round(float(np.log2(max(num_points / cluster_size, 1.0))))
    return min(wanted, num_points.bit_length() - 1)


def cluster_sizes(num_points: int, levels: int) -> Int64Array:
    """Points of each cluster in order, int64[2**levels]: they differ by at most one."""
    sizes = np.array([num_points], np.int64)
    for _ in range(levels):
        sizes = np.stack([-(-sizes // 2), sizes // 2], axis=1).reshape(-1)
    return sizes


def balanced_clusters(vectors: jax.Array, levels: int, seed: int) -> Int32Array:
    """The points, cluster after cluster: a permutation of 0 .. N - 1, int32[N].

    Clusters have the sizes of `cluster_sizes`. A function of the vectors' bits and the seed on
    one kind of device, whatever N is, and whether vectors are equal or zero.

    Args:
        vectors: float32[N, D].
        levels: see `num_levels`.
        seed: of the first centres.
    """
    num_points = vectors.shape[0]
    members = jnp.arange(num_points, dtype=jnp.int32)[None]
    sizes = cluster_sizes(num_points, 0)
    for level in range(levels):
        key = jax.random.fold_in(jax.random.key(seed), level)
        members = _split(vectors, members, jnp.asarray(sizes, jnp.int32), key)
        sizes = cluster_sizes(num_points, level + 1)
    table = np.asarray(members)
    return np.asarray(table[np.arange(table.shape[1]) < sizes[:, None]], np.int32)


class _Split(NamedTuple):
    """How groups are split: places in order and whether each goes to the first half, [groups, m];
    the mean similarity with its centre, [groups]."""

    order: jax.Array
    is_left: jax.Array
    similarity: jax.Array


@jax.jit
def _split(vectors: jax.Array, members: jax.Array, sizes: jax.Array, key: jax.Array) -> jax.Array:
    """Two groups of each: int32[groups, m] to int32[2 groups, (m + 1) // 2].

    Args:
        vectors: float32[N, D].
        members: of each group its points, then a place that counts for nothing if it has m - 1.
        sizes: int32[groups].
        key: of the first centres.
    """
    groups, width = members.shape
    is_member = jnp.arange(width) < sizes[:, None]
    points = vectors[members]
    left_sizes = (sizes + 1) // 2
    order = _order(points, is_member, left_sizes, _first_centres(points, sizes, key))
    half = (width + 1) // 2
    places = jnp.arange(half)
    left = jnp.broadcast_to(places, (groups, half))
    right = jnp.minimum(left_sizes[:, None] + places, width - 1)
    both = jnp.stack([left, right], axis=1).reshape(groups, 2 * half)
    ordered = jnp.take_along_axis(members, order, axis=1)
    return jnp.take_along_axis(ordered, both, axis=1).reshape(2 * groups, half)


def _first_centres(points: jax.Array, sizes: jax.Array, key: jax.Array) -> jax.Array:
    """Two different points of each group, float32[groups, 2, D]."""
    draws = jax.random.uniform(key, (sizes.shape[0], 2))
    first = jnp.minimum((draws[:, 0] * sizes).astype(jnp.int32), sizes - 1)
    others = jnp.maximum(sizes - 1, 1)
    step = 1 + jnp.minimum((draws[:, 1] * others).astype(jnp.int32), others - 1)
    places = jnp.stack([first, (first + step) % sizes], axis=1)
    return jnp.take_along_axis(points, places[..., None], axis=1)


def _order(
    points: jax.Array, is_member: jax.Array, left_sizes: jax.Array, centres: jax.Array
) -> jax.Array:
    """Places of each group's points, those of the first half first: int32[groups, m]."""
    counts = is_member.sum(axis=1)
    ranks = jnp.broadcast_to(jnp.arange(points.shape[1]), is_member.shape)
    rows = jnp.arange(points.shape[0])[:, None]

    def order_by(centres: jax.Array) -> _Split:
        similarities = jnp.einsum("gmd,gcd->gmc", points, centres)
        nearer = jnp.where(is_member, similarities[..., 0] - similarities[..., 1], -jnp.inf)
        order = jnp.argsort(-nearer, axis=1, stable=True)
        # The rank of each place, by the inverse permutation: a second sort would cost as much.
        is_left = jnp.zeros_like(ranks).at[rows, order].set(ranks) < left_sizes[:, None]
        own = jnp.where(is_left, similarities[..., 0], similarities[..., 1])
        return _Split(order, is_left, jnp.where(is_member, own, 0.0).sum(axis=1) / counts)

    def centres_of(is_left: jax.Array) -> jax.Array:
        weights = jnp.stack([is_left & is_member, ~is_left & is_member], axis=-1)
        sums = jnp.einsum("gmc,gmd->gcd", weights.astype(jnp.float32), points)
        norms = jnp.sqrt((sums * sums).sum(axis=-1, keepdims=True))
        return sums / jnp.maximum(norms, 1e-12)

    def is_growing(state: tuple[jax.Array, _Split, jax.Array]) -> jax.Array:
        turn, _, gain = state
        return (turn < MAX_ROUNDS) & jnp.any(gain > MIN_GAIN)

    def improve(
        state: tuple[jax.Array, _Split, jax.Array],
    ) -> tuple[jax.Array, _Split, jax.Array]:
        turn, old, gain = state
        new = order_by(centres_of(old.is_left))
        # Each group stops by itself, so that no group depends on another.
        goes_on = gain > MIN_GAIN
        kept = _Split(
            jnp.where(goes_on[:, None], new.order, old.order),
            jnp.where(goes_on[:, None], new.is_left, old.is_left),
            jnp.where(goes_on, new.similarity, old.similarity),
        )
        return turn + 1, kept, jnp.where(goes_on, new.similarity - old.similarity, 0.0)

    first = order_by(centres)
    start = (jnp.zeros((), jnp.int32), first, jnp.full_like(first.similarity, jnp.inf))
    found: _Split = lax.while_loop(is_growing, improve, start)[1]
    return found.order
