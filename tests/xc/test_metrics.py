"""Measures against figures worked out by hand, and against a plain loop over points."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.xc import metrics
from jaxserve.xc.label_sets import LabelSets

TRUTH = LabelSets.of([[0, 2], [1], [0, 1, 3]], 4)
PREDICTED = np.array([[2, 1, 0], [3, 0, 2], [3, 0, 1]])


def test_precision_and_ndcg_by_hand() -> None:
    assert metrics.precision(TRUTH, PREDICTED, 1) == pytest.approx(2 / 3)
    assert metrics.precision(TRUTH, PREDICTED, 3) == pytest.approx((2 / 3 + 0 + 1) / 3)
    half = 1 / math.log2(4)
    first = (1 + half) / (1 + 1 / math.log2(3))
    assert metrics.ndcg(TRUTH, PREDICTED, 3) == pytest.approx((first + 0 + 1) / 3)


def test_propensity_scores_by_hand() -> None:
    # ln N = 3, b + 1 = 4, a = 0.5: C = 4; label counts of 6, 1 -> 1 + 4 / 3, 1 + 4 / 2.
    inverse = metrics.inverse_propensities(np.array([6, 1]), 20, a=0.5, b=3.0)
    scale = (math.log(20) - 1) * 2
    assert inverse == pytest.approx([1 + scale / 3, 1 + scale / 2])
    weights = np.array([1.0, 2.0, 4.0, 8.0])
    # Found at rank 1: 4 (label 2), none, 8. Best: 4, 2, 8.
    assert metrics.propensity_precision(TRUTH, PREDICTED, 1, weights) == pytest.approx(12 / 14)
    # At 3: 4 + 1, 0, 8 + 1 + 2; best 5, 2, 11.
    assert metrics.propensity_precision(TRUTH, PREDICTED, 3, weights) == pytest.approx(16 / 18)


def test_recall_coverage_and_thirds_by_hand() -> None:
    assert metrics.recall(TRUTH, PREDICTED, 2) == pytest.approx((1 / 2 + 0 + 2 / 3) / 3)
    # Label 0 is found in 1 of 2, 1 in 0 of 2, 2 in 1 of 1, 3 in 1 of 1.
    assert metrics.macro_recall(TRUTH, PREDICTED, 2) == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert metrics.coverage(TRUTH, PREDICTED, 2) == pytest.approx(3 / 4)
    parts = metrics.thirds(np.array([10, 60, 15, 15]))
    assert parts.tolist() == [2, 0, 1, 2]
    shares = metrics.precision_of_thirds(TRUTH, PREDICTED, 3, parts)
    assert sum(shares) == pytest.approx(metrics.precision(TRUTH, PREDICTED, 3))
    assert shares[0] == pytest.approx(1 / 9)


def _oracle(
    sets: list[set[int]], ranked: list[list[int]], k: int, weights: np.ndarray, *, discounted: bool
) -> float:
    """pyxclib's definitions, a point at a time."""
    got = best = 0.0
    for own, predicted in zip(sets, ranked, strict=True):
        discounts = [1 / math.log2(rank + 2) if discounted else 1.0 for rank in range(k)]
        norm = sum(discounts[: min(k, max(len(own), 1))]) if discounted else k
        dearest = sorted(own, key=lambda label: (-weights[label], label))[:k]
        got += (
            sum(d * weights[p] for d, p in zip(discounts, predicted, strict=False) if p in own)
            / norm
        )
        best += sum(d * weights[p] for d, p in zip(discounts, dearest, strict=False)) / norm
    return got / best


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_measures_equal_a_loop(data: st.DataObject) -> None:
    num_labels = data.draw(st.integers(6, 12))
    labels = st.integers(0, num_labels - 1)
    sets = data.draw(st.lists(st.sets(labels, min_size=1, max_size=6), min_size=1, max_size=6))
    ranked = [data.draw(st.permutations(range(num_labels))) for _ in sets]
    truth, predicted = LabelSets.of(sets, num_labels), np.array(ranked)
    weights = np.array(
        data.draw(st.lists(st.floats(1, 50), min_size=num_labels, max_size=num_labels))
    )
    for k in (1, 3, 5):
        for discounted, measure in (
            (False, metrics.propensity_precision), (True, metrics.propensity_ndcg)
        ):  # fmt: skip
            expected = _oracle(sets, ranked, k, weights, discounted=discounted)
            assert measure(truth, predicted, k, weights) == pytest.approx(expected, abs=1e-6)
        plain = np.mean(
            [len(own & set(row[:k])) / k for own, row in zip(sets, ranked, strict=True)]
        )
        assert metrics.precision(truth, predicted, k) == pytest.approx(plain, abs=1e-6)


def test_report_of_a_perfect_ranking_is_full_marks() -> None:
    truth = LabelSets.of([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]], 10)
    predicted = np.array([list(range(10)), [*range(5, 10), *range(5)]])
    found = metrics.report(truth, predicted, np.arange(1, 11), 100)
    for name in ("P@1", "P@5", "nDCG@5", "PSP@5", "PSnDCG@5", "R@10", "coverage@5"):
        assert found[name] == pytest.approx(100.0), name
    with pytest.raises(ValueError, match="too few"):
        metrics.precision(truth, predicted[:, :2], 3)
