"""Makes the index of a run's labels, and measures what it finds."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import numpy as np

from jaxserve.xc.dataset import XcDataset
from jaxserve.xc.evaluation import check_labels, embed, index_recall
from jaxserve.xc.label_index import IndexSettings, LabelIndex, remove_index
from jaxserve.xc.served import MAX_CLASSES, open_served

MAX_POINTS = 2000
"""Most points that are ranked exactly too."""


@dataclass(frozen=True, kw_only=True)
class IndexReport:
    """An index that was made.

    Attributes:
        num_labels: in it.
        build_s: seconds that it took.
        num_ranked: best labels of each point that were looked for.
        num_points: points that they were looked for, 0 without a data set.
        recall: share of them that it finds; None without a data set.
    """

    num_labels: int
    build_s: float
    num_ranked: int
    num_points: int
    recall: float | None


def build_index(run: Path, settings: IndexSettings, data: Path | None) -> IndexReport:
    """Makes a run's index anew, and keeps it beside the run.

    Args:
        run: its folder.
        settings: of the graph.
        data: the data set that it was trained on; None: what is found is not measured.

    Raises:
        FormatError: no run of extreme classification.
        XcDataError: a data set of other labels.
        ConfigError: usearch is not installed.
    """
    remove_index(run)
    served = open_served(run)
    validation = None
    if data is not None:
        dataset = XcDataset(data)
        check_labels(served.stored, dataset)
        validation = dataset.split("validation")
    encoder = jax.device_put(served.stored.read_encoder())
    labels = np.asarray(served.label_vectors(encoder))
    begin_s = time.perf_counter()
    index = LabelIndex.build(labels, settings)
    build_s = time.perf_counter() - begin_s
    num_points, recall = 0, None
    num_ranked = min(MAX_CLASSES, len(labels))
    if validation is not None:
        points = embed(served.model.spec, encoder, validation.texts)[:MAX_POINTS]
        num_points, recall = len(points), index_recall(index, points, labels, num_ranked)
    report = IndexReport(
        num_labels=len(labels),
        build_s=build_s,
        num_ranked=num_ranked,
        num_points=num_points,
        recall=recall,
    )
    index.save(run, served.vectors_digest(), {"report": asdict(report)})
    return report
