"""Batches: every point once an epoch, whole clusters, new ones at once, all from the state."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.xc.clusters import cluster_sizes
from jaxserve.xc.label_sets import LabelSets
from jaxserve.xc.sampler_config import SamplerConfig
from jaxserve.xc.samplers import GROUPED, LEVELS, NO_LABEL, BatchOrder, Sampler

NUM_POINTS, NUM_LABELS, WIDTH = 101, 30, 8
BATCH = 16


def _unit(rows: int, seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(rows, WIDTH)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


LABELS = LabelSets.of(
    (np.random.default_rng(point).integers(0, NUM_LABELS, 1 + point % 3).tolist()
     for point in range(NUM_POINTS)), NUM_LABELS,
)  # fmt: skip


class FakeEncoder:
    """Embeddings that change from step to step."""

    def __init__(self) -> None:
        self.version = 0
        self.asked: list[str] = []

    def points(self) -> jax.Array:
        self.asked.append("points")
        return jnp.asarray(_unit(NUM_POINTS, self.version))

    def labels(self) -> jax.Array:
        self.asked.append("labels")
        return jnp.asarray(_unit(NUM_LABELS, 1000 + self.version))


CONFIGS = {
    "random": SamplerConfig(name="random"),
    "tas": SamplerConfig(name="tas", cluster_size=8),
    "ngame": SamplerConfig(cluster_size=8, warmup_epochs=1, refresh_every=2),
    "growing": SamplerConfig(
        cluster_size=16, initial_cluster_size=1, double_every=1, warmup_epochs=1, refresh_every=1
    ),
    "bank": SamplerConfig(cluster_size=8, warmup_epochs=1, refresh_every=1, memory_bank=True),
    "centroid": SamplerConfig(
        name="ngame_centroid",
        cluster_size=8,
        warmup_epochs=1,
        refresh_every=1,
        num_mined=12,
        pool=5,
    ),
    "ance": SamplerConfig(name="ance", warmup_epochs=1, refresh_every=2, pool=4),
}


def _sampler(config: SamplerConfig, seed: int = 7) -> Sampler:
    return Sampler(config, LABELS, seed=seed, batch_size=BATCH, width=WIDTH)


def _batches(config: SamplerConfig, num_steps: int, stop_at: int | None = None) -> list[tuple]:
    """Draws of `num_steps`; with `stop_at`, the state moves to a new object there."""
    encoder, sampler = FakeEncoder(), _sampler(config)
    order = BatchOrder(sampler, BATCH, sampler.initial_state())
    draws = []
    for step in range(num_steps):
        if step == stop_at:
            saved = {name: array.copy() for name, array in order.state.items()}
            order = BatchOrder(_sampler(config), BATCH, saved)
        encoder.version = step
        draw = order.next_draw(step, encoder)
        order.remember(draw.ids, np.asarray(encoder.points())[draw.ids])
        draws.append((draw.ids.tolist(), draw.positives.tolist(), draw.extra.tolist()))
    return draws


@pytest.mark.parametrize("name", CONFIGS)
def test_every_point_once_an_epoch(name: str) -> None:
    draws = _batches(CONFIGS[name], 4 * NUM_POINTS // BATCH + 1)
    ids = [one for draw in draws for one in draw[0]]
    for epoch in range(3):
        own = ids[epoch * NUM_POINTS : (epoch + 1) * NUM_POINTS]
        assert sorted(own) == list(range(NUM_POINTS))
        following = ids[(epoch + 1) * NUM_POINTS : (epoch + 2) * NUM_POINTS]
        assert own != following
    for batch, positives, _ in draws:
        assert all(label in LABELS[point] for point, label in zip(batch, positives, strict=True))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_state_that_moves_gives_the_same_batches(name: str) -> None:
    whole = _batches(CONFIGS[name], 20)
    # 6 and 7 lie around the refresh at the beginning of epoch 1 (example 101, step 6).
    for stop_at in (1, 6, 7, 13):
        assert _batches(CONFIGS[name], 20, stop_at) == whole


def test_clusters_are_used_by_the_very_batch_of_the_refresh_and_stay_whole() -> None:
    config = SamplerConfig(cluster_size=8, warmup_epochs=1, refresh_every=1)
    sampler, encoder = _sampler(config), FakeEncoder()
    order = BatchOrder(sampler, BATCH, sampler.initial_state())
    for step in range(6):
        order.next_draw(step, encoder)
        assert int(order.state[LEVELS]) == -1
    draw = order.next_draw(6, encoder)  # Examples 96 .. 111: epoch 1 begins at its sixth place.
    levels = int(order.state[LEVELS])
    assert levels == 4
    sizes = cluster_sizes(NUM_POINTS, levels)
    cluster_of = np.empty(NUM_POINTS, int)
    cluster_of[order.state[GROUPED]] = np.repeat(np.arange(len(sizes)), sizes)
    epoch = sampler.order(order.state, 1)
    assert draw.ids[5:].tolist() == epoch[:11].tolist()
    runs = cluster_of[epoch]
    changes = 1 + int((runs[1:] != runs[:-1]).sum())
    assert changes == len(sizes)  # Each cluster is one run of the order: whole but for edges.


def test_clusters_of_one_point_are_plain_random_batches() -> None:
    one = SamplerConfig(cluster_size=1, warmup_epochs=0, refresh_every=1)
    assert _batches(one, 15) == _batches(CONFIGS["random"], 15)
    first = [ids for ids, _, _ in _batches(one, 3)]
    assert [one for ids in first for one in ids] == IndexSampler(NUM_POINTS, 7).ids_of(
        0, 48
    ).tolist()


def test_the_curriculum_depends_on_the_epoch_alone() -> None:
    config = CONFIGS["growing"]
    assert [config.cluster_size_at(epoch) for epoch in range(1, 8)] == [1, 2, 4, 8, 16, 16, 16]
    assert [CONFIGS["ngame"].refreshes_at(epoch) for epoch in range(5)] == [
        False, True, False, True, False,
    ]  # fmt: skip
    assert [CONFIGS["tas"].refreshes_at(epoch) for epoch in range(3)] == [True, False, False]


def test_hard_labels_are_the_best_that_are_not_the_points_own() -> None:
    sampler, encoder = _sampler(CONFIGS["ance"]), FakeEncoder()
    order = BatchOrder(sampler, BATCH, sampler.initial_state())
    warm = order.next_draw(0, encoder)
    assert (warm.extra == NO_LABEL).all()
    for step in range(1, 8):
        draw = order.next_draw(step, encoder)
    scores = np.asarray(encoder.points() @ encoder.labels().T)
    for point, label in zip(draw.ids.tolist(), draw.extra.tolist(), strict=True):
        ranked = [one for one in np.argsort(-scores[point]) if one not in LABELS[point]]
        assert label in ranked[:4]


def test_labels_of_centres_join_once_each_and_best_first() -> None:
    sampler, encoder = _sampler(CONFIGS["centroid"]), FakeEncoder()
    order = BatchOrder(sampler, BATCH, sampler.initial_state())
    for step in range(8):
        draw = order.next_draw(step, encoder)
    extra = draw.extra[draw.extra != NO_LABEL]
    assert len(extra) == len(set(extra.tolist())) > 0
    sizes = cluster_sizes(NUM_POINTS, int(order.state[LEVELS]))
    starts = np.concatenate([[0], np.cumsum(sizes)])
    points, labels = np.asarray(encoder.points()), np.asarray(encoder.labels())
    best = set()
    for first, end in itertools.pairwise(starts):
        members = order.state[GROUPED][first:end]
        if set(members.tolist()) & set(draw.ids.tolist()):
            best.add(int(np.argmax(labels @ points[members].mean(axis=0))))
    assert best <= set(extra.tolist())


def test_a_memory_bank_encodes_nothing_anew() -> None:
    config, encoder = CONFIGS["bank"], FakeEncoder()
    sampler = _sampler(config)
    order = BatchOrder(sampler, BATCH, sampler.initial_state())
    for step in range(14):
        draw = order.next_draw(step, encoder)
        order.remember(draw.ids, _unit(BATCH, step))
    assert order.num_refreshes == 2
    assert encoder.asked == []


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"name": "ngame_centroid"}, "num_mined is 0"),
        ({"name": "ance", "num_mined": 5}, "num_mined is 5"),
        ({"initial_cluster_size": 65}, "initial_cluster_size is 65"),
        ({"memory_bank": True, "warmup_epochs": 0}, "memory_bank needs"),
        ({"name": "ance", "memory_bank": True}, "memory_bank needs"),
        ({"refresh_every": 0}, "refresh_every is 0"),
        ({"name": "ngame_centroid", "num_mined": 8, "initial_cluster_size": 1}, "at least 2"),
    ],
)
def test_settings_that_cannot_work_are_named(fields: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        SamplerConfig(**fields)


def test_points_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="needs a label"):
        Sampler(SamplerConfig(), LabelSets.of([[0], []], 1), seed=0, batch_size=1, width=1)
