"""Losses of a dual encoder over the labels of its batch, and of label classifiers.

A known positive is never a negative, however often its label or point is in the batch: the caller
says so with a mask of all pairs.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.xc.config import LossConfig

_LOWEST = -1e9
"""Below every similarity, and finite: its gradient is none."""
HARDNESS_TEMPERATURE = 0.1


def encoder_losses(
    config: LossConfig,
    points: jax.Array,
    labels: jax.Array,
    is_excluded: jax.Array,
) -> jax.Array:
    """The loss of each point, float32[B].

    Args:
        config: which loss.
        points: float32[B, D], of length one.
        labels: float32[C, D], of length one; the first B are the points' own positives.
        is_excluded: bool[B, C], pairs that are no negatives: known positives, places without a
            label, and those of a label that stands further in front.
    """
    similarities = points @ labels.T
    own = jnp.arange(points.shape[0])
    positives = similarities[own, own]
    if config.name == "softmax":
        return _softmax(config, positives, similarities, is_excluded)
    return _triplet(config, positives[:, None], similarities, is_excluded)


def classifier_losses(
    config: LossConfig, scores: jax.Array, is_positive: jax.Array, is_negative: jax.Array
) -> jax.Array:
    """The loss of each point for label classifiers, float32[B].

    Args:
        config: which loss.
        scores: float32[B, C], similarities of points and classifiers.
        is_positive: bool[B, C], at least one a point.
        is_negative: bool[B, C].
    """
    if config.name == "softmax":
        denominators = _log_sum_negatives(config, scores, ~is_negative)
        scaled = scores / config.temperature
        each = jnp.logaddexp(scaled, denominators[:, None]) - scaled
        return jnp.where(is_positive, each, 0.0).sum(axis=1) / is_positive.sum(axis=1)
    num_positives = min(config.num_hard_positives, scores.shape[1])
    lowest, places = lax.top_k(jnp.where(is_positive, -scores, _LOWEST), num_positives)
    chosen = jnp.take_along_axis(is_positive, places, axis=1)
    # A place that no positive takes gets one that no negative comes near.
    positives = jnp.where(chosen, -lowest, -_LOWEST)
    return _triplet(config, positives, scores, ~is_negative)


def _triplet(
    config: LossConfig, positives: jax.Array, scores: jax.Array, is_excluded: jax.Array
) -> jax.Array:
    """Hinges of each point's positives [B, p] and its hardest negatives: their weighted mean.

    Weights are a softmax over the pairs that violate the margin. All others weigh nothing, so
    few violations are not diluted.
    """
    num_hard = min(config.num_hard, scores.shape[1])
    negatives, _ = lax.top_k(jnp.where(is_excluded, _LOWEST, scores), num_hard)
    is_real = negatives > _LOWEST / 2
    hinges = negatives[:, None, :] - positives[:, :, None] + config.margin
    counts = is_real[:, None, :] & (hinges > 0)
    hardness = jnp.where(counts, negatives[:, None, :] / HARDNESS_TEMPERATURE, _LOWEST)
    shape = (scores.shape[0], -1)
    weights = lax.stop_gradient(jax.nn.softmax(hardness.reshape(shape), axis=1))
    kept = jnp.where(counts, hinges, 0.0).reshape(shape)
    return (weights * kept).sum(axis=1)


def _softmax(
    config: LossConfig, positives: jax.Array, similarities: jax.Array, is_excluded: jax.Array
) -> jax.Array:
    denominators = _log_sum_negatives(config, similarities, is_excluded)
    scaled = positives / config.temperature
    return jnp.logaddexp(scaled, denominators) - scaled


def _log_sum_negatives(config: LossConfig, scores: jax.Array, is_excluded: jax.Array) -> jax.Array:
    """Log of the sum of the negatives' exponentials, float32[B]; very small if there is none."""
    scaled = jnp.where(is_excluded, _LOWEST, scores / config.temperature)
    return jax.nn.logsumexp(scaled, axis=1)
