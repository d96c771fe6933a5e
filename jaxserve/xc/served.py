"""ServedClassifier: a run of extreme classification, ready to answer texts with labels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import DTypeLike

from jaxserve.errors import ConfigError
from jaxserve.xc.dataset import tokenise
from jaxserve.xc.encoders import EncoderSpec, Tree, abstract_params
from jaxserve.xc.label_index import INDEX_FILE, LabelIndex, open_index
from jaxserve.xc.model_folder import XcModel, digest_of, open_xc_model
from jaxserve.xc.retrieval import top_labels
from models.bag_of_embeddings import BagConfig
from models.tokenizer import Tokenizer

MAX_CLASSES = 100
"""Most labels that a text gets."""
MAX_LABELS = 1 << 24
"""Ids travel as float32 beside their scores, which holds whole numbers up to here."""
_CHUNK = 256

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ClassifierModel:
    """What the steps compute; see `jaxserve.engine.encoder.text_model.TextModel`.

    Parameters are `{"encoder": ..., "labels": float32[L, D]}`; a label's score is the inner product
    of its vector and the text's embedding. With an index, labels are ranked on the host, after the
    step: parameters have no "labels" then, and the step makes embeddings only.

    Attributes:
        spec: of the encoder.
        num_labels: L.
        has_index: whether labels are found by a `LabelIndex`.
    """

    spec: EncoderSpec
    num_labels: int
    has_index: bool = False

    @property
    def family(self) -> str:
        """See `TextModel`."""
        return "extreme_classification"

    @property
    def vocab_size(self) -> int:
        """See `TextModel`."""
        return self.spec.model.vocab_size

    @property
    def embedding_size(self) -> int:
        """See `TextModel`."""
        return self.spec.width

    @property
    def num_classes(self) -> int:
        """See `TextModel`."""
        return min(MAX_CLASSES, self.num_labels)

    def abstract_params(self, dtype: DTypeLike) -> Any:
        """See `TextModel`; float32, whatever `dtype` is."""
        del dtype
        if self.has_index:
            return {"encoder": abstract_params(self.spec)}
        labels = jax.ShapeDtypeStruct((self.num_labels, self.spec.width), jnp.float32)
        return {"encoder": abstract_params(self.spec), "labels": labels}

    def compute(self, params: Any, token_ids: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """See `TextModel`."""
        packed = jnp.concatenate([num_tokens[:, None], token_ids], axis=1)
        vectors = self.spec.embed(params["encoder"], packed)
        if self.has_index:
            return vectors
        scores, ids = top_labels(vectors, params["labels"], k=self.num_classes)
        return jnp.concatenate([vectors, scores, ids.astype(jnp.float32)], axis=1)


@dataclass(frozen=True)
class Ranking:
    """Labels of a step's embeddings, by an index.

    Attributes:
        index: of the labels.
        num_classes: that a text gets.
    """

    index: LabelIndex
    num_classes: int

    def __call__(self, vectors: Floats) -> Floats:
        """What `ClassifierModel.compute` makes without an index, of float32[texts, D]."""
        scores, ids = self.index.search(vectors, self.num_classes)
        return np.concatenate([vectors, scores, ids.astype(np.float32)], axis=1)


@dataclass(frozen=True)
class ServedClassifier:
    """A run that has been opened; what `models.encoder_loading.Encoder` is for other encoders.

    Attributes:
        path: the run's folder.
        model: what its steps compute.
        stored: where its arrays are.
        max_tokens: most tokens of a text, special ones included.
    """

    path: Path
    model: ClassifierModel
    stored: XcModel
    max_tokens: int

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer, which adds special tokens only if the encoder was trained with them."""
        tokenizer = Tokenizer.from_folder(self.path / "tokenizer")
        if isinstance(self.model.spec.model, BagConfig):
            tokenizer.backend.post_processor = None
        return tokenizer

    def load_params(self, dtype: DTypeLike) -> Any:
        """Encoder and, without an index, the labels' vectors.

        Raises:
            ConfigError: another dtype than float32.
        """
        if jnp.dtype(dtype) != jnp.float32:
            raise ConfigError(
                f"--dtype {jnp.dtype(dtype).name}: runs of extreme classification are served in "
                "float32 only"
            )
        encoder = jax.device_put(self.stored.read_encoder())
        if self.model.has_index:
            return {"encoder": encoder}
        return {"encoder": encoder, "labels": jnp.asarray(self.label_vectors(encoder))}

    def label_vectors(self, encoder: Tree) -> Floats:
        """Of all labels, float32[L, D], the fusion in them.

        Args:
            encoder: its parameters on the device.
        """
        if self.stored.stage == "encoder":
            return self._embedded_labels(encoder)
        trained = self.stored.read_classifiers()
        labels = trained / np.sqrt(np.square(trained).sum(axis=1, keepdims=True) + 1e-12)
        if weight := self.stored.fusion_weight():
            labels = labels + np.float32(weight) * self._embedded_labels(encoder)
        return np.asarray(labels, np.float32)

    def vectors_digest(self) -> str:
        """SHA-256, hex, of what the labels' vectors are made of. Their own bits may differ from
        machine to machine."""
        digest = hashlib.sha256(digest_of(self.stored.read_encoder()).encode())
        digest.update("\n".join(self.stored.label_texts()).encode())
        if self.stored.stage == "classifiers":
            digest.update(digest_of({"labels": self.stored.read_classifiers()}).encode())
            digest.update(repr(self.stored.fusion_weight()).encode())
        return digest.hexdigest()

    def load_ranking(self) -> Ranking | None:
        """What ranks labels after a step; None: the step does.

        Raises:
            XcDataError: the index is damaged, or of other vectors.
            ConfigError: usearch is not installed.
        """
        if not self.model.has_index:
            return None
        digest = self.vectors_digest()
        index = open_index(self.path, self.model.embedding_size, digest)
        return Ranking(index, self.model.num_classes)

    def label_texts(self) -> tuple[str, ...]:
        """One a label."""
        return tuple(self.stored.label_texts())

    def _embedded_labels(self, encoder: Tree) -> Floats:
        spec = self.model.spec
        tokenizer = Tokenizer.from_folder(self.path / "tokenizer")
        texts = tokenise(tokenizer, self.stored.label_texts(), spec.max_tokens)
        embed = jax.jit(spec.embed)
        parts = []
        for first in range(0, len(texts), _CHUNK):
            ids = np.arange(first, first + _CHUNK)
            packed = spec.pack(texts, np.where(ids < len(texts), ids, -1))
            parts.append(np.asarray(embed(encoder, packed)))
        return np.concatenate(parts)[: len(texts)]


def open_served(path: Path) -> ServedClassifier:
    """Opens a run.

    Raises:
        FormatError: it is none, or its files do not fit together.
        ConfigError: it has too many labels.
    """
    stored = open_xc_model(path)
    if stored.num_labels > MAX_LABELS:
        raise ConfigError(f"{path} has {stored.num_labels} labels; at most {MAX_LABELS} are served")
    has_index = (path / INDEX_FILE).is_file()
    model = ClassifierModel(stored.encoder, stored.num_labels, has_index)
    return ServedClassifier(path, model, stored, stored.encoder.row_size - 1)
