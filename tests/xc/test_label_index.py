"""The index of labels: what it finds beside looking at all, and what a run keeps of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.xc.errors import XcDataError
from jaxserve.xc.label_index import (
    GRAPH_FILE,
    INDEX_FILE,
    IndexSettings,
    LabelIndex,
    open_index,
    recall,
    remove_index,
)
from jaxserve.xc.retrieval import retrieve

WIDTH = 32


def _vectors(num_vectors: int, seed: int) -> np.ndarray:
    """As a bag of embeddings makes them: means of a few words, of which some are frequent."""
    words = np.random.default_rng(0).normal(size=(4000, WIDTH))
    rng = np.random.default_rng(seed)
    places = np.minimum(rng.zipf(1.3, (num_vectors, 6)), len(words)) - 1
    vectors = words[places].mean(axis=1)
    return np.float32(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))


def test_it_finds_nearly_all_that_looking_at_all_labels_finds() -> None:
    labels, queries = _vectors(6000, 1), _vectors(200, 2)
    index = LabelIndex.build(labels, IndexSettings())
    scores, ids = index.search(queries, 100)
    assert index.search(queries[:1], 100)[1].tolist() == ids[:1].tolist()
    assert recall(ids, retrieve(queries, labels, 100)[1]) >= 0.98
    np.testing.assert_allclose(scores, np.einsum("qd,qkd->qk", queries, labels[ids]), atol=2e-6)
    assert (np.diff(scores, axis=1) <= 0).all()
    narrow = LabelIndex.build(labels, IndexSettings(num_links=2, build_width=4, search_width=4))
    assert recall(narrow.search(queries, 100)[1], retrieve(queries, labels, 100)[1]) < 0.9


def test_vectors_of_different_lengths_are_ranked_by_inner_product() -> None:
    rng = np.random.default_rng(3)
    lengths = rng.uniform(0.5, 3.0, (3000, 1)).astype(np.float32)
    labels, queries = _vectors(3000, 1) * lengths, _vectors(100, 2)
    _, ids = LabelIndex.build(labels, IndexSettings()).search(queries, 100)
    assert recall(ids, retrieve(queries, labels, 100)[1]) >= 0.98


def test_equal_labels_come_in_order_and_places_without_a_label_say_so() -> None:
    labels = np.repeat(np.eye(4, dtype=np.float32), 3, axis=0)
    index = LabelIndex.build(labels, IndexSettings(), num_threads=1)
    scores, ids = index.search(np.eye(4, dtype=np.float32), 12)
    assert ids[:, :3].tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert np.isneginf(scores[ids < 0]).all()
    assert np.isfinite(scores[ids >= 0]).all()
    assert index.search(labels[:1], 12)[1][0, :3].tolist() == [0, 1, 2]
    with pytest.raises(ValueError, match="only 12 labels"):
        index.search(labels, 13)
    assert index.search(labels[:0], 5)[1].shape == (0, 5)


def test_one_thread_makes_the_same_graph_again() -> None:
    labels = _vectors(500, 1)
    first, second = (LabelIndex.build(labels, IndexSettings(), num_threads=1) for _ in range(2))
    found = [one.search(_vectors(50, 2), 20)[1].tolist() for one in (first, second)]
    assert found[0] == found[1]


def test_a_stored_index_is_the_same_and_is_checked(tmp_path: Path) -> None:
    labels, queries = _vectors(400, 1), _vectors(20, 2)
    index = LabelIndex.build(labels, IndexSettings(search_width=50))
    index.save(tmp_path, "of these", {"report": {}})
    opened = open_index(tmp_path, WIDTH, "of these")
    assert opened.settings == index.settings
    for mine, stored in zip(index.search(queries, 10), opened.search(queries, 10), strict=True):
        assert mine.tolist() == stored.tolist()
    with pytest.raises(XcDataError, match="fused anew"):
        open_index(tmp_path, WIDTH, "of others")
    graph = bytearray((tmp_path / GRAPH_FILE).read_bytes())
    graph[len(graph) // 2] ^= 1
    (tmp_path / GRAPH_FILE).write_bytes(graph)
    with pytest.raises(XcDataError, match="damaged"):
        open_index(tmp_path, WIDTH, "of these")
    assert remove_index(tmp_path)
    assert not remove_index(tmp_path)
    assert not (tmp_path / INDEX_FILE).exists()
    with pytest.raises(XcDataError, match="missing"):
        open_index(tmp_path, WIDTH, "of these")
