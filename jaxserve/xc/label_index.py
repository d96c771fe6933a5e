"""LabelIndex: the labels that score highest for a text, found without looking at all of them.

A graph of the labels' vectors (HNSW, Malkov and Yashunin 2018, by usearch): a search walks it
towards the text, so it costs about the logarithm of the number of labels, and may miss some. The
graph is searched by inner product, which finds its way only among vectors of one length; so each
vector gets one more number that makes all of them as long as the longest, and each text a zero
(Bachrach et al. 2014): no score changes.

    label-index.usearch    the graph, with the vectors; mapped, not read
    label-index.json       its settings, of which vectors it is, its digest, and what it finds
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from checkpoint.store.digests import blake3_of_file
from checkpoint.store.durable import fsync_path
from jaxserve.errors import ConfigError
from jaxserve.xc.errors import XcDataError
from jaxserve.xc.model_folder import write_json
from models.json_file import read_json

GRAPH_FILE = "label-index.usearch"
INDEX_FILE = "label-index.json"
NO_LABEL = -1

Floats = npt.NDArray[np.float32]
Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class IndexSettings:
    """How thorough a graph is, and a search in it.

    Attributes:
        num_links: neighbours of a label in the graph.
        build_width: labels that are kept in view while one is linked.
        search_width: the same while a text is looked up; more is slower, and finds more.
    """

    num_links: int = 16
    build_width: int = 128
    search_width: int = 300

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value < 1:
                raise ConfigError(f"{name} is {value}; it must be at least 1")


class LabelIndex:
    """See above. Made by `build` or `open_index`.

    Args:
        graph: usearch's.
        settings: of the graph.
        num_labels: L.
    """

    def __init__(self, graph: Any, settings: IndexSettings, num_labels: int) -> None:
        self.settings = settings
        self.num_labels = num_labels
        self._graph = graph

    @classmethod
    def build(cls, labels: Floats, settings: IndexSettings, num_threads: int = 0) -> LabelIndex:
        """The index of vectors float32[L, D].

        Args:
            labels: of any lengths.
            settings: of the graph.
            num_threads: 0: one a core. The graph of several threads depends on their timing.
        """
        graph = _new_graph(labels.shape[1] + 1, settings)
        squares = np.square(labels).sum(axis=1)
        missing = np.sqrt(np.maximum(squares.max() - squares, 0.0))
        vectors = np.concatenate([labels, missing[:, None]], axis=1).astype(np.float32)
        graph.add(np.arange(len(labels)), vectors, threads=num_threads)
        return cls(graph, settings, len(labels))

    def search(self, queries: Floats, k: int, num_threads: int = 0) -> tuple[Floats, Int32Array]:
        """Of each query about the k largest inner products, best first.

        Args:
            queries: float32[Q, D].
            k: how many; at most L.
            num_threads: 0: one a core.

        Returns:
            Scores float32[Q, k] and ids int32[Q, k]; -inf and `NO_LABEL` where the graph has led
            to fewer. Of equal scores the smaller id comes first.

        Raises:
            ValueError: k is above L.
        """
        if k > self.num_labels:
            raise ValueError(f"k is {k}, but there are only {self.num_labels} labels")
        if not len(queries):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int32)
        padded = np.pad(np.asarray(queries, np.float32), ((0, 0), (0, 1)))
        scores = np.full((len(queries), k), -np.inf, np.float32)
        ids = np.full((len(queries), k), NO_LABEL, np.int32)
        found = self._graph.search(padded, k, threads=num_threads)
        if len(queries) == 1:  # Of one query usearch gives as many as it has found.
            scores[0, : len(found)], ids[0, : len(found)] = 1.0 - found.distances, found.keys
        else:
            is_found = np.arange(k) < found.counts[:, None]
            scores[is_found] = 1.0 - found.distances[is_found]
            ids[is_found] = found.keys[is_found]
        order = np.lexsort((ids, -scores), axis=1)
        return np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)

    def save(self, folder: Path, vectors_digest: str, notes: dict[str, Any]) -> None:
        """Writes both files; `label-index.json` comes last.

        Args:
            folder: of the run.
            vectors_digest: of the vectors, see `open_index`.
            notes: kept beside it, for people.
        """
        staged = folder / f".{GRAPH_FILE}.new"
        self._graph.save(str(staged))
        fsync_path(staged)
        (folder / INDEX_FILE).unlink(missing_ok=True)
        staged.replace(folder / GRAPH_FILE)
        fields = {
            "vectors_digest": vectors_digest,
            "num_labels": self.num_labels,
            "settings": asdict(self.settings),
            "blake3": blake3_of_file(folder / GRAPH_FILE),
        }
        write_json(folder / INDEX_FILE, fields | notes)


def open_index(folder: Path, width: int, vectors_digest: str) -> LabelIndex:
    """A run's index, mapped into memory.

    Args:
        folder: of the run.
        width: D.
        vectors_digest: of the vectors that the run has now.

    Raises:
        XcDataError: it is missing or damaged, or of other vectors.
        ConfigError: usearch is not installed.
    """
    mend = f"make it anew with `jaxserve classify index {folder}`, or add --remove"
    fields = read_json(folder / INDEX_FILE)
    if fields is None:
        raise XcDataError(f"{folder / INDEX_FILE} is missing or damaged: {mend}")
    if fields.get("vectors_digest") != vectors_digest:
        raise XcDataError(
            f"{folder / INDEX_FILE} is of other labels' vectors than the run has now (it was "
            f"trained on, or fused anew): {mend}"
        )
    path = folder / GRAPH_FILE
    if not path.is_file() or blake3_of_file(path) != fields["blake3"]:
        raise XcDataError(f"{path} is missing or damaged: {mend}")
    settings = IndexSettings(**fields["settings"])
    graph = _new_graph(width + 1, settings)
    graph.view(str(path))
    return LabelIndex(graph, settings, fields["num_labels"])


def remove_index(folder: Path) -> bool:
    """Removes a run's index; whether it had one."""
    had_one = (folder / INDEX_FILE).is_file()
    for name in (INDEX_FILE, GRAPH_FILE):
        (folder / name).unlink(missing_ok=True)
    return had_one


def recall(found: Int32Array, exact: Int32Array) -> float:
    """The share of `exact` ids, int32[Q, k], that `found` has, row by row."""
    hits = [np.isin(right, own).sum() for own, right in zip(found, exact, strict=True)]
    return float(np.sum(hits) / exact.size)


def _new_graph(num_dimensions: int, settings: IndexSettings) -> Any:
    try:
        from usearch.index import Index
    except ImportError:
        raise ConfigError("an index of labels needs usearch; install jaxserve[index]") from None
    return Index(
        ndim=num_dimensions,
        metric="ip",
        dtype="f32",
        connectivity=settings.num_links,
        expansion_add=settings.build_width,
        expansion_search=settings.search_width,
    )
