"""Balanced clusters of points, by splitting in half again and again (NGAME, section 4.2 and code).

A split runs 2-means on the sphere: points are ordered by how much nearer they are to one centre
than to the other, and the first half goes to it, until the mean similarity stops to grow. Centres
of a large group are found on a sample of it. One program splits all groups of a level, however many
there are, so the work is N log N and nothing is compiled twice.
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
SAMPLE_SIZE = 256
"""Most points of a group that its centres are found on."""
GROUP_BATCH = 8
"""Groups whose centres are looked for at once."""
POINT_BLOCK = 4096
"""Points that are compared with centres at once."""

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
    most_groups = -(-(1 << max(levels - 1, 0)) // GROUP_BATCH) * GROUP_BATCH
    members = np.arange(num_points, dtype=np.int32)
    for level in range(levels):
        sizes = cluster_sizes(num_points, level)
        groups = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
        padded = np.zeros((2, most_groups), np.int32)
        padded[:, : len(sizes)] = np.cumsum(sizes) - sizes, sizes
        key = jax.random.fold_in(jax.random.key(seed), level)
        within = _Groups(padded[0], padded[1], np.int32(len(sizes)))
        nearer = np.asarray(_nearer_to_first(vectors, members, groups, within, key))
        # Groups stay in order, and so do points that are as near.
        members = members[np.lexsort((-nearer, groups))]
    return members


class _Groups(NamedTuple):
    """Where each group begins and how many points it has, int32[most]; how many groups count."""

    starts: jax.Array | npt.NDArray[np.int32]
    sizes: jax.Array | npt.NDArray[np.int32]
    num_groups: jax.Array | np.int32


@jax.jit
def _nearer_to_first(
    vectors: jax.Array, members: jax.Array, group_of: jax.Array, groups: _Groups, key: jax.Array
) -> jax.Array:
    """How much nearer each place's point is to the first centre of its group: float32[N].

    Args:
        vectors: float32[N, D].
        members: int32[N], group after group.
        group_of: int32[N], of each place.
        groups: of this level.
        key: of the first centres.
    """
    most = groups.starts.shape[0]
    draws = jax.random.uniform(key, (most, 2))
    find = jax.vmap(_axis, in_axes=(None, None, 0, 0, 0))

    def find_some(number: jax.Array, axes: jax.Array) -> jax.Array:
        first = number * GROUP_BATCH
        some = (
            lax.dynamic_slice_in_dim(one, first, GROUP_BATCH)
            for one in (jnp.asarray(groups.starts), jnp.asarray(groups.sizes), draws)
        )
        found = find(vectors, members, *some)
        return lax.dynamic_update_slice_in_dim(axes, found, first, axis=0)

    num_batches = (groups.num_groups + GROUP_BATCH - 1) // GROUP_BATCH
    axes = jnp.zeros((most, vectors.shape[1]), jnp.float32)
    axes = lax.fori_loop(0, num_batches, find_some, axes)
    nearer: jax.Array = lax.map(
        lambda place: vectors[members[place]] @ axes[group_of[place]],
        jnp.arange(members.shape[0]),
        batch_size=POINT_BLOCK,
    )
    return nearer


class _Search(NamedTuple):
    """2-means of a group: the difference of its centres, float32[D], the points' mean similarity
    with their own, what the last round added to it, and the rounds done."""

    axis: jax.Array
    similarity: jax.Array
    gain: jax.Array
    num_rounds: jax.Array


def _axis(
    vectors: jax.Array, members: jax.Array, start: jax.Array, size: jax.Array, draws: jax.Array
) -> jax.Array:
    """The difference of a group's two centres, float32[D].

    Args:
        vectors: float32[N, D].
        members: int32[N], group after group.
        start: int32[], the group's first place.
        size: int32[], how many it has.
        draws: float32[2], 0 to 1, of the first two centres.
    """
    places = jnp.arange(SAMPLE_SIZE)
    count = jnp.clip(size, 1, SAMPLE_SIZE)
    is_member = places < count
    # The sample lies at equal distances.
    taken = start + places * jnp.maximum(size // SAMPLE_SIZE, 1)
    points = vectors[members[jnp.where(is_member, taken, 0)]] * is_member[:, None]
    total = is_member.astype(jnp.float32) @ points
    first = jnp.minimum((draws[0] * count).astype(jnp.int32), count - 1)
    others = jnp.maximum(count - 1, 1)
    step = 1 + jnp.minimum((draws[1] * others).astype(jnp.int32), others - 1)

    def improved(state: _Search) -> _Search:
        nearer = jnp.where(is_member, points @ state.axis, -jnp.inf)
        is_left = _are_largest(nearer, (count + 1) // 2)
        left = is_left.astype(jnp.float32) @ points
        right = total - left
        left_norm, right_norm = jnp.sqrt(left @ left), jnp.sqrt(right @ right)
        axis = left / jnp.maximum(left_norm, 1e-12) - right / jnp.maximum(right_norm, 1e-12)
        # The similarities of a half's points with its centre add up to the length of their sum.
        similarity = (left_norm + right_norm) / count
        return _Search(axis, similarity, similarity - state.similarity, state.num_rounds + 1)

    begin = _Search(
        points[first] - points[(first + step) % count],
        jnp.float32(-jnp.inf),
        jnp.float32(jnp.inf),
        jnp.zeros((), jnp.int32),
    )
    found: _Search = lax.while_loop(
        lambda state: (state.num_rounds < MAX_ROUNDS) & (state.gain > MIN_GAIN), improved, begin
    )
    return found.axis


def _are_largest(values: jax.Array, count: jax.Array) -> jax.Array:
    """Marks the `count` largest of float32[n], and those equal to the last of them: bool[n].

    By bisection over bits: for few values a sort takes ten times as long.
    """
    bits = lax.bitcast_convert_type(values, jnp.uint32)
    sign = jnp.uint32(1 << 31)
    # Unsigned numbers in the order of the values.
    keys = jnp.where(bits >= sign, ~bits, bits | sign)

    def with_bit(number: jax.Array, least: jax.Array) -> jax.Array:
        tried = least | (sign >> number.astype(jnp.uint32))
        return jnp.where((keys >= tried).sum(dtype=jnp.int32) >= count, tried, least)

    are_largest: jax.Array = keys >= lax.fori_loop(0, 32, with_bit, jnp.uint32(0))
    return are_largest
