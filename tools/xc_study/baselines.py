"""What needs no training: words in common."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.feature_extraction.text import TfidfVectorizer

from jaxserve.xc.dataset import XcDataset
from jaxserve.xc.evaluation import NUM_RANKED
from tools.xc_study.runs import measured

NUM_NEIGHBOURS = 10
_BLOCK = 500


def run_baselines(dataset: XcDataset) -> dict[str, dict[str, Any]]:
    """Records of TF-IDF nearest neighbours, TF-IDF of points against labels, and the most popular
    labels."""
    train, test = dataset.split("train").labels, dataset.split("test").labels
    vectorizer = TfidfVectorizer(sublinear_tf=True, stop_words="english")
    known = vectorizer.fit_transform(dataset.texts("train"))
    asked = vectorizer.transform(dataset.texts("test"))
    labels = vectorizer.transform(dataset.label_texts())
    neighbours, direct = [], []
    for first in range(0, test.num_points, _BLOCK):
        part = asked[first : first + _BLOCK]
        neighbours.append(_by_neighbours(train, (part @ known.T).toarray()))
        direct.append(_best((part @ labels.T).toarray(), NUM_RANKED))
    popular = np.argsort(-train.label_counts(), kind="stable")[:NUM_RANKED]
    rankings = {
        "tfidf_10nn": np.concatenate(neighbours),
        "tfidf_labels": np.concatenate(direct),
        "most_popular": np.broadcast_to(popular, (test.num_points, NUM_RANKED)),
    }
    return {
        name: {"kind": "baseline", "method": name, **measured(dataset, ranked.astype(np.int32))}
        for name, ranked in rankings.items()
    }


def _by_neighbours(train: Any, similarities: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Labels of each point's nearest training points, weighted by similarity."""
    near = _best(similarities, NUM_NEIGHBOURS)
    ranked = np.empty((len(near), NUM_RANKED), np.int64)
    for row, places in enumerate(near):
        scores = np.zeros(train.num_labels)
        for place in places:
            scores[train[int(place)]] += similarities[row, place]
        ranked[row] = np.lexsort((np.arange(len(scores)), -scores))[:NUM_RANKED]
    return ranked


def _best(scores: npt.NDArray[np.float64], k: int) -> npt.NDArray[np.int64]:
    kept = np.argpartition(-scores, k, axis=1)[:, :k]
    order = np.argsort(-np.take_along_axis(scores, kept, axis=1), axis=1, kind="stable")
    return np.take_along_axis(kept, order, axis=1)
