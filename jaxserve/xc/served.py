"""ServedClassifier: a run of extreme classification, ready to answer texts with labels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import DTypeLike

from jaxserve.errors import ConfigError
from jaxserve.xc.dataset import tokenise
from jaxserve.xc.encoders import EncoderSpec, Tree, abstract_params
from jaxserve.xc.model_folder import XcModel, open_xc_model
from jaxserve.xc.retrieval import top_labels
from models.bag_of_embeddings import BagConfig
from models.tokenizer import Tokenizer

MAX_CLASSES = 100
"""Most labels that a text gets."""
MAX_LABELS = 1 << 24
"""Ids travel as float32 beside their scores, which holds whole numbers up to here."""
_CHUNK = 256


@dataclass(frozen=True)
class ClassifierModel:
    """What the steps compute; see `jaxserve.engine.encoder.text_model.TextModel`.

    Parameters are `{"encoder": ..., "labels": float32[L, D]}`; a label's score is the inner product
    of its vector and the text's embedding.

    Attributes:
        spec: of the encoder.
        num_labels: L.
    """

    spec: EncoderSpec
    num_labels: int

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
        labels = jax.ShapeDtypeStruct((self.num_labels, self.spec.width), jnp.float32)
        return {"encoder": abstract_params(self.spec), "labels": labels}

    def compute(self, params: Any, token_ids: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """See `TextModel`."""
        packed = jnp.concatenate([num_tokens[:, None], token_ids], axis=1)
        vectors = self.spec.embed(params["encoder"], packed)
        scores, ids = top_labels(vectors, params["labels"], k=self.num_classes)
        return jnp.concatenate([vectors, scores, ids.astype(jnp.float32)], axis=1)


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
        """Encoder and the labels' vectors, the fusion in them.

        Raises:
            ConfigError: another dtype than float32.
        """
        if jnp.dtype(dtype) != jnp.float32:
            raise ConfigError(
                f"--dtype {jnp.dtype(dtype).name}: runs of extreme classification are served in "
                "float32 only"
            )
        encoder = jax.device_put(self.stored.read_encoder())
        weight = self.stored.fusion_weight()
        labels: npt.NDArray[np.float32]
        if self.stored.stage == "encoder":
            labels = self._embedded_labels(encoder)
        else:
            trained = self.stored.read_classifiers()
            labels = trained / np.sqrt(np.square(trained).sum(axis=1, keepdims=True) + 1e-12)
            if weight:
                labels = labels + np.float32(weight) * self._embedded_labels(encoder)
        return {"encoder": encoder, "labels": jnp.asarray(labels)}

    def label_texts(self) -> tuple[str, ...]:
        """One a label."""
        return tuple(self.stored.label_texts())

    def _embedded_labels(self, encoder: Tree) -> npt.NDArray[np.float32]:
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
    model = ClassifierModel(stored.encoder, stored.num_labels)
    return ServedClassifier(path, model, stored, stored.encoder.row_size - 1)
