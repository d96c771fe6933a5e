"""How good a trained model is on a split, and the fusion that is best on validation data."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np
import numpy.typing as npt

from jaxserve.xc import metrics
from jaxserve.xc.dataset import Texts, XcDataset
from jaxserve.xc.encoders import EncoderSpec, Tree
from jaxserve.xc.errors import XcDataError
from jaxserve.xc.label_index import LabelIndex, recall
from jaxserve.xc.label_sets import LabelSets
from jaxserve.xc.model_folder import XcModel
from jaxserve.xc.retrieval import retrieve

FUSION_WEIGHTS = (0.0, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)
NUM_RANKED = 10
_CHUNK = 256

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Fusion:
    """Chosen on validation points.

    Attributes:
        weight: of the labels' embeddings beside their classifiers.
        tried: P@1 in percent of each weight.
    """

    weight: float
    tried: dict[float, float]


def choose_fusion(
    truth: LabelSets, points: Floats, classifiers: Floats, embeddings: Floats
) -> Fusion:
    """The weight with the highest P@1, the smaller of equal ones.

    Scores are inner products, so the fused score is one of the weighted sum of vectors.

    Args:
        truth: of the validation points.
        points: their embeddings, float32[N, D].
        classifiers, embeddings: of the labels, float32[L, D].
    """
    tried = {}
    for weight in FUSION_WEIGHTS:
        found = retrieve(points, classifiers + np.float32(weight) * embeddings, 1)[1]
        tried[weight] = 100 * metrics.precision(truth, found, 1)
    best = max(tried, key=lambda weight: (tried[weight], -weight))
    return Fusion(best, tried)


def fuse(model: XcModel, dataset: XcDataset) -> Fusion:
    """Chooses the fusion of a run of stage "classifiers".

    Raises:
        XcDataError: another stage, or a data set of other labels.
    """
    if model.stage != "classifiers":
        raise XcDataError(f"{model.folder} has no classifiers: nothing is to be fused")
    check_labels(model, dataset)
    encoder = model.read_encoder()
    validation = dataset.split("validation")
    points = embed(model.encoder, encoder, validation.texts)
    embeddings = embed(model.encoder, encoder, dataset.labels())
    return choose_fusion(validation.labels, points, _unit(model.read_classifiers()), embeddings)


def measure(model: XcModel, dataset: XcDataset, split: str) -> dict[str, float]:
    """Measures of a run's ranking, with its fusion: see `metrics.report`.

    Pairs that the data set excludes are left out of rankings.
    """
    check_labels(model, dataset)
    encoder = model.read_encoder()
    own, train = dataset.split(split), dataset.split("train").labels
    labels = embed(model.encoder, encoder, dataset.labels())
    if model.stage == "classifiers":
        weight = np.float32(model.fusion_weight())
        labels = _unit(model.read_classifiers()) + weight * labels
    most = int(np.bincount(own.excluded[:, 0]).max()) if len(own.excluded) else 0
    num_ranked = min(NUM_RANKED + most, model.num_labels)
    _, ranked = retrieve(embed(model.encoder, encoder, own.texts), labels, num_ranked)
    ranked = without_excluded(ranked, own.excluded)[:, :NUM_RANKED]
    return metrics.report(own.labels, ranked, train.label_counts(), train.num_points)


def index_recall(index: LabelIndex, points: Floats, labels: Floats, k: int) -> float:
    """The share of each point's k best labels that an index finds.

    Args:
        index: of `labels`.
        points: float32[N, D].
        labels: float32[L, D].
        k: at most L.
    """
    return recall(index.search(points, k)[1], retrieve(points, labels, k)[1])


def without_excluded(
    ranked: npt.NDArray[np.int32], excluded: npt.NDArray[np.int32]
) -> npt.NDArray[np.int32]:
    """Rankings int32[N, k] with what is excluded moved behind the rest, as -1."""
    if not len(excluded):
        return ranked
    num_labels = np.int64(max(ranked.max(), excluded[:, 1].max()) + 1)
    asked = np.arange(len(ranked))[:, None] * num_labels + ranked
    is_out = np.isin(asked, excluded[:, 0] * num_labels + excluded[:, 1])
    order = np.argsort(is_out, axis=1, kind="stable")
    return np.take_along_axis(np.where(is_out, np.int32(-1), ranked), order, axis=1)


def embed(spec: EncoderSpec, params: Tree, texts: Texts) -> Floats:
    """Embeddings of all texts, float32[n, D]."""
    on_device = jax.device_put(params)
    program = jax.jit(spec.embed)
    parts = []
    for first in range(0, len(texts), _CHUNK):
        ids = np.arange(first, first + _CHUNK)
        packed = spec.pack(texts, np.where(ids < len(texts), ids, -1))
        parts.append(np.asarray(program(on_device, packed)))
    return np.concatenate(parts)[: len(texts)]


def check_labels(model: XcModel, dataset: XcDataset) -> None:
    """Raises XcDataError if a data set has other labels than a run was trained on."""
    if dataset.label_texts() != model.label_texts():
        raise XcDataError(
            f"{dataset.folder} has other labels than {model.folder} was trained on: give the data "
            "set of its config.toml"
        )


def _unit(vectors: Floats) -> Floats:
    return np.asarray(
        vectors / np.sqrt(np.square(vectors).sum(axis=1, keepdims=True) + 1e-12), np.float32
    )
