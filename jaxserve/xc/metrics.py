"""How good ranked labels are: the measures of extreme classification, as pure functions.

Precision, nDCG and their propensity-scored forms follow the definitions of the Extreme
Classification Repository and of pyxclib: precision divides by k however few labels a point has,
nDCG by the best that the point's number of labels allows, and the propensity-scored forms by the
mean of the best ranking of the same points (Jain, Prabhu, Varma, "Extreme Multi-label Loss
Functions", KDD 2016).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from jaxserve.xc.label_sets import Int64Array, LabelSets

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.integer[Any]]

PROPENSITY_A = 0.55
PROPENSITY_B = 1.5


def inverse_propensities(
    label_counts: Int64Array, num_points: int, a: float = PROPENSITY_A, b: float = PROPENSITY_B
) -> Floats:
    """How much rarer a label is seen than it is true, float64[num_labels], at least 1.

    1 + C (f + b)^-a with C = (ln N - 1) (b + 1)^a.

    Args:
        label_counts: f, training points of each label.
        num_points: N, all training points.
        a, b: of the data set: 0.6 and 2.6 for Amazon's, 0.5 and 0.4 for Wikipedia's.
    """
    scale = (np.log(num_points) - 1.0) * (b + 1.0) ** a
    return np.asarray(1.0 + scale * (label_counts + b) ** -a, np.float64)


def precision_per_point(truth: LabelSets, predicted: Ints, k: int) -> Floats:
    """Right ones among the first k, divided by k: float64[N].

    Args:
        truth: the labels that are right.
        predicted: int[N, at least k], best first, distinct; a negative id stands for none.
        k: how many count.
    """
    return np.asarray(truth.hits(_first(predicted, k)).sum(axis=1) / k, np.float64)


def precision(truth: LabelSets, predicted: Ints, k: int) -> float:
    """P@k, the mean of `precision_per_point`."""
    return float(precision_per_point(truth, predicted, k).mean())


def ndcg(truth: LabelSets, predicted: Ints, k: int) -> float:
    """nDCG@k: gains 1 / log2(1 + rank), divided by the most that a point can have."""
    return float(_discounted(truth, predicted, k, np.ones(truth.num_labels)).mean())


def propensity_precision(truth: LabelSets, predicted: Ints, k: int, inverse: Floats) -> float:
    """PSP@k: precision in which a label counts as much as its inverse propensity, divided by
    that of the best ranking."""

    def mean_gain(ranked: Ints) -> float:
        first = _first(ranked, k)
        return float((truth.hits(first) * inverse[first]).sum(axis=1).mean())

    return mean_gain(predicted) / mean_gain(_best_ranking(truth, k, inverse))


def propensity_ndcg(truth: LabelSets, predicted: Ints, k: int, inverse: Floats) -> float:
    """PSnDCG@k: the same for nDCG."""
    best = _best_ranking(truth, k, inverse)
    got = _discounted(truth, predicted, k, inverse).mean()
    return float(got / _discounted(truth, best, k, inverse).mean())


def recall(truth: LabelSets, predicted: Ints, k: int) -> float:
    """R@k: share of a point's labels among the first k; mean over points that have labels."""
    sizes = truth.sizes()
    found = truth.hits(_first(predicted, k)).sum(axis=1)[sizes > 0]
    return float((found / sizes[sizes > 0]).mean())


def macro_recall(truth: LabelSets, predicted: Ints, k: int) -> float:
    """Share of a label's points that have it among their first k; mean over labels with points."""
    found, counts = _found_of_label(truth, predicted, k), truth.label_counts()
    return float((found[counts > 0] / counts[counts > 0]).mean())


def coverage(truth: LabelSets, predicted: Ints, k: int) -> float:
    """Share of the labels with points that are found for at least one of these."""
    found, counts = _found_of_label(truth, predicted, k), truth.label_counts()
    return float((found[counts > 0] > 0).mean())


def thirds(label_counts: Int64Array) -> Ints:
    """0 head, 1 torso or 2 tail for each label, int64[num_labels]: each third has about a third
    of all (point, label) pairs of training. Labels of equal counts are ordered by id."""
    order = np.argsort(-label_counts, kind="stable")
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(label_counts[order])[:-1]])
    parts = np.empty(len(label_counts), np.int64)
    parts[order] = np.minimum(3 * before // max(int(label_counts.sum()), 1), 2)
    return parts


def precision_of_thirds(
    truth: LabelSets, predicted: Ints, k: int, parts: Ints
) -> tuple[float, float, float]:
    """What head, torso and tail labels add to P@k: the three sum up to it."""
    first = _first(predicted, k)
    hits = truth.hits(first)
    shares = [float((hits & (parts[first] == part)).sum(axis=1).mean() / k) for part in range(3)]
    return shares[0], shares[1], shares[2]


def report(
    truth: LabelSets, predicted: Ints, train_counts: Int64Array, num_train: int
) -> dict[str, float]:
    """All measures by the names that tables use, in percent.

    Args:
        truth: the labels that are right.
        predicted: int[N, at least 10].
        train_counts: training points of each label.
        num_train: training points.
    """
    inverse = inverse_propensities(train_counts, num_train)
    found: dict[str, float] = {}
    for k in (1, 3, 5):
        found[f"P@{k}"] = precision(truth, predicted, k)
        found[f"nDCG@{k}"] = ndcg(truth, predicted, k)
        found[f"PSP@{k}"] = propensity_precision(truth, predicted, k, inverse)
        found[f"PSnDCG@{k}"] = propensity_ndcg(truth, predicted, k, inverse)
    found["R@10"] = recall(truth, predicted, 10)
    found["macro-R@10"] = macro_recall(truth, predicted, 10)
    found["coverage@5"] = coverage(truth, predicted, 5)
    shares = precision_of_thirds(truth, predicted, 5, thirds(train_counts))
    found |= {
        f"P@5 {name}": one for name, one in zip(("head", "torso", "tail"), shares, strict=True)
    }
    return {name: 100.0 * value for name, value in found.items()}


def _first(predicted: Ints, k: int) -> Ints:
    if predicted.shape[1] < k:
        raise ValueError(
            f"{predicted.shape[1]} predictions a point are too few for a measure at {k}"
        )
    return predicted[:, :k]


def _discounted(truth: LabelSets, predicted: Ints, k: int, gains: Floats) -> Floats:
    """Discounted gains of each point, divided by the discounts of as many ranks as it can fill."""
    first = _first(predicted, k)
    discounts = 1.0 / np.log2(np.arange(k) + 2.0)
    got = (truth.hits(first) * gains[first] * discounts).sum(axis=1)
    most = np.concatenate([np.ones(1), np.cumsum(discounts)])[np.minimum(truth.sizes(), k)]
    return np.asarray(got / most, np.float64)


def _best_ranking(truth: LabelSets, k: int, gains: Floats) -> Ints:
    """Each point's own labels, dearest first, int64[N, k]; -1 where it has no more."""
    points = np.repeat(np.arange(truth.num_points), truth.sizes())
    order = np.lexsort((truth.label_ids, -gains[truth.label_ids], points))
    ranks = np.arange(len(order)) - truth.starts[points]
    best = np.full((truth.num_points, k), -1, np.int64)
    kept = ranks < k
    best[points[kept], ranks[kept]] = truth.label_ids[order][kept]
    return best


def _found_of_label(truth: LabelSets, predicted: Ints, k: int) -> Int64Array:
    first = _first(predicted, k)
    return np.bincount(first[truth.hits(first)], minlength=truth.num_labels).astype(np.int64)
