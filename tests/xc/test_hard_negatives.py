"""Larger clusters put more of a point's hardest negatives into its batch."""

from __future__ import annotations

import numpy as np

from jaxserve.xc.label_sets import LabelSets
from tools.xc_study.hard_negatives import hard_coverage

NUM_TOPICS, LABELS_A_TOPIC = 32, 16


def test_coverage_grows_with_clusters() -> None:
    rng = np.random.default_rng(0)
    topics = rng.normal(size=(NUM_TOPICS, 1, 8)) + 0.1 * rng.normal(
        size=(NUM_TOPICS, LABELS_A_TOPIC, 8)
    )
    labels = topics.reshape(-1, 8)
    points = labels + 0.05 * rng.normal(size=labels.shape)
    labels, points = (
        (one / np.linalg.norm(one, axis=1, keepdims=True)).astype(np.float32)
        for one in (labels, points)
    )
    truth = LabelSets.of([[label] for label in range(len(labels))], len(labels))
    found = hard_coverage(truth, points, labels, 64, cluster_sizes=(1, 16))
    # A random batch of 64 of 512 points has an eighth of all labels.
    assert 9 < found[1] < 16
    assert found[16] > 3 * found[1]
    assert hard_coverage(truth, points, labels, 512, cluster_sizes=(1,)) == {1: 100.0}
