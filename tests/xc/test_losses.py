"""Losses: what is excluded has no part in them, and hinges are what they are by hand."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.errors import ConfigError
from jaxserve.xc.config import LossConfig, LossName
from jaxserve.xc.label_sets import LabelSets
from jaxserve.xc.losses import classifier_losses, encoder_losses
from models.bag_of_embeddings import BagConfig, Params, embed_texts, init_params

BOTH: tuple[LossName, ...] = ("triplet", "softmax")


def _unit(shape: tuple[int, int], seed: int) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("name", BOTH)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_a_known_positive_is_never_a_negative(name: LossName, data: st.DataObject) -> None:
    """With points and labels that come several times, moving a known positive that is not a
    point's own column moves neither its loss nor any gradient through that pair."""
    sets = [[0, 1], [1, 2], [3]]
    labels = LabelSets.of(sets, 4)
    ids = np.array(data.draw(st.lists(st.integers(0, 2), min_size=4, max_size=4)))
    positives = np.array([data.draw(st.sampled_from(sets[point])) for point in ids], np.int32)
    extra = np.array(data.draw(st.lists(st.integers(-1, 3), min_size=3, max_size=3)), np.int32)
    columns = np.concatenate([positives, extra])
    excluded = labels.contains(ids, columns) | (columns < 0)
    points, vectors = _unit((4, 5), 0), _unit((7, 5), 1)

    def similarities_matter(matrix: jax.Array) -> jax.Array:
        # With D = number of columns and labels = identity, similarities are free numbers.
        return encoder_losses(
            LossConfig(name=name), matrix, jnp.eye(7), jnp.asarray(excluded)
        ).sum()

    gradient = np.asarray(jax.grad(similarities_matter)(jnp.asarray(points @ vectors.T)))
    own = np.eye(4, 7, dtype=bool)
    assert (gradient[excluded & ~own] == 0).all()
    assert (gradient[own] <= 0).all()
    assert (gradient[~excluded] >= 0).all()


@pytest.mark.parametrize("name", BOTH)
def test_fewer_negatives_than_asked_for(name: LossName) -> None:
    points, labels = jnp.asarray(_unit((2, 4), 0)), jnp.asarray(_unit((2, 4), 1))
    config = LossConfig(name=name, num_hard=10)
    none = encoder_losses(config, points, labels, jnp.ones((2, 2), bool))
    assert np.allclose(none, 0.0, atol=1e-6)
    some = encoder_losses(config, points, labels, jnp.eye(2, dtype=bool))
    assert np.isfinite(some).all()


def test_hinges_by_hand() -> None:
    scores = jnp.array([[0.9, 0.8, 0.1, 0.7]])
    labels = jnp.eye(4)
    excluded = jnp.array([[True, False, False, False]])
    config = LossConfig(margin=0.3, num_hard=2)
    # Violations 0.2 (of 0.8) and 0.1 (of 0.7), with weights e^8 and e^7.
    weight = 1 / (1 + np.exp(-1.0))
    expected = weight * 0.2 + (1 - weight) * 0.1
    assert float(encoder_losses(config, scores, labels, excluded)[0]) == pytest.approx(
        expected, 1e-5
    )


def test_collapse_is_the_margin() -> None:
    same = jnp.ones((4, 1))
    losses = encoder_losses(LossConfig(margin=0.3), same, same, jnp.eye(4, dtype=bool))
    assert np.allclose(losses, 0.3)


@pytest.mark.parametrize("name", BOTH)
def test_classifiers_push_positives_up_and_negatives_down(name: LossName) -> None:
    scores = jnp.array([[0.2, 0.1, 0.3, 0.0], [0.0, 0.4, 0.1, 0.2]])
    is_positive = jnp.array([[True, False, False, False], [True, True, False, False]])
    is_negative = jnp.array([[False, True, True, False], [False, False, True, True]])
    gradient = jax.grad(
        lambda s: classifier_losses(LossConfig(name=name), s, is_positive, is_negative).sum()
    )(scores)
    assert (np.asarray(gradient)[np.asarray(is_positive)] <= 0).all()
    assert float(gradient[0, 0]) < 0
    assert float(gradient[0, 2]) > 0
    assert float(gradient[0, 3]) == 0.0  # Neither.


def test_settings_that_cannot_work_are_named() -> None:
    with pytest.raises(ConfigError, match="temperature is 0"):
        LossConfig(temperature=0)


def test_steps_of_adam_do_not_move_all_texts_to_one_place() -> None:
    """The first steps move every number of the residual layer by the same amount."""
    config = BagConfig(vocab_size=200, width=96, hidden=192)
    params = init_params(config, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (64, 8), 0, config.vocab_size)
    lengths = jnp.full((64,), 8)

    def spread(params: Params) -> float:
        return float(embed_texts(params, tokens, lengths).std(axis=0).mean())

    moved = params | {"mlp": jax.tree.map(lambda one: one + 30 * 3e-3, params["mlp"])}
    assert spread(moved) > 0.8 * spread(params)
