"""Balanced clustering: a partition into equal parts, for any number of points and any vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.xc.clusters import balanced_clusters, cluster_sizes, num_levels


def _unit(num_points: int, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(num_points, 8)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("num_points", [1, 2, 3, 7, 33])
def test_sizes_differ_by_at_most_one_and_all_points_are_there(num_points: int) -> None:
    for size in (1, 2, 5, 64, 1000):
        levels = num_levels(num_points, size)
        sizes = cluster_sizes(num_points, levels)
        assert len(sizes) == 2**levels
        assert sizes.sum() == num_points
        assert 1 <= sizes.min() <= sizes.max() <= sizes.min() + 1
    levels = num_levels(num_points, 4)
    members = balanced_clusters(jnp.asarray(_unit(num_points)), levels, 3)
    assert sorted(members.tolist()) == list(range(num_points))


def test_size_asked_for_is_met_within_the_square_root_of_two() -> None:
    for num_points in (100, 1000, 76_258):
        for size in (2, 8, 64):
            mean = num_points / 2 ** num_levels(num_points, size)
            assert size / 1.4143 <= mean <= size * 1.4143


@pytest.mark.parametrize("vectors", [np.zeros((13, 8)), np.ones((13, 8))])
def test_equal_and_zero_vectors_end(vectors: np.ndarray) -> None:
    members = balanced_clusters(jnp.asarray(vectors, jnp.float32), 3, 0)
    assert sorted(members.tolist()) == list(range(13))


def test_the_seed_decides_and_nothing_else() -> None:
    vectors = jnp.asarray(_unit(33))
    first = balanced_clusters(vectors, 3, 5)
    assert first.tolist() == balanced_clusters(vectors, 3, 5).tolist()
    assert first.tolist() != balanced_clusters(vectors, 3, 6).tolist()


# 400 points a group: centres are found on a sample, since a level has up to 1600 a group.
@pytest.mark.parametrize("num_each", [16, 400])
def test_well_separated_groups_are_found(num_each: int) -> None:
    centres = np.eye(4, 8, dtype=np.float32)
    labels = np.repeat(np.arange(4), num_each)
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(len(labels), 8)).astype(np.float32)
    shuffled = rng.permutation(len(labels))
    vectors = (centres[labels] + 0.01 * noise)[shuffled]
    members = balanced_clusters(jnp.asarray(vectors, jnp.float32), 2, 1)
    found = labels[shuffled][members].reshape(4, num_each)
    assert all(len(set(row)) == 1 for row in found.tolist())


def test_equal_vectors_keep_their_order() -> None:
    members = balanced_clusters(jnp.ones((13, 8), jnp.float32), 3, 0)
    assert members.tolist() == list(range(13))


def test_each_device_finds_the_same() -> None:
    vectors = _unit(33)
    results = [
        balanced_clusters(jax.device_put(vectors, device), 3, 1).tolist()
        for device in jax.devices()
    ]
    assert all(one == results[0] for one in results)
