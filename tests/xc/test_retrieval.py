"""Exact retrieval against a full sort."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.xc.retrieval import retrieve, top_labels


@pytest.mark.parametrize("label_block", [5, 16, 37, 100])
def test_blocks_give_what_a_full_sort_gives(label_block: int) -> None:
    rng = np.random.default_rng(0)
    # Few different values, so that there are ties.
    queries = rng.integers(-2, 3, (7, 3)).astype(np.float32)
    labels = rng.integers(-2, 3, (37, 3)).astype(np.float32)
    scores, ids = top_labels(queries, labels, k=5, label_block=label_block)
    full = queries @ labels.T
    expected = np.lexsort((np.broadcast_to(np.arange(37), full.shape), -full), axis=1)[:, :5]
    assert np.asarray(ids).tolist() == expected.tolist()
    assert np.asarray(scores).tolist() == np.take_along_axis(full, expected, axis=1).tolist()


def test_queries_of_any_number_and_too_large_k() -> None:
    rng = np.random.default_rng(1)
    queries = rng.normal(size=(11, 4)).astype(np.float32)
    labels = rng.normal(size=(20, 4)).astype(np.float32)
    scores, ids = retrieve(queries, labels, 3, query_block=4)
    assert ids.tolist() == np.argsort(-(queries @ labels.T), axis=1)[:, :3].tolist()
    assert scores.shape == (11, 3)
    with pytest.raises(ValueError, match="only 20 labels"):
        retrieve(queries, labels, 21)
