"""TextModel: what an encoder's steps compute of texts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import jax
from jax.typing import DTypeLike

from models import bert
from models.config import ModelConfig


class TextModel(Protocol):
    """Hashable: programs are compiled for it."""

    @property
    def family(self) -> str:
        """For people."""
        ...

    @property
    def vocab_size(self) -> int:
        """Every token id is below it."""
        ...

    @property
    def embedding_size(self) -> int:
        """Numbers of an embedding, the first ones of what a text gets."""
        ...

    @property
    def num_classes(self) -> int:
        """Labels that a text gets after its embedding: so many scores, then as many label ids."""
        ...

    def abstract_params(self, dtype: DTypeLike) -> Any:
        """The parameters as shapes."""
        ...

    def compute(self, params: Any, token_ids: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """float32[texts, embedding_size + 2 num_classes] of int32[texts, T] and int32[texts]; of
        a model with an index of labels the embeddings only."""
        ...


@dataclass(frozen=True)
class BertTextModel:
    """An encoder of BERT's kind.

    Attributes:
        config: its shape.
        normalizes: its embeddings have length one.
    """

    config: ModelConfig
    normalizes: bool

    @property
    def family(self) -> str:
        """See `TextModel`."""
        return self.config.family

    @property
    def vocab_size(self) -> int:
        """See `TextModel`."""
        return self.config.vocab_size

    @property
    def embedding_size(self) -> int:
        """See `TextModel`."""
        return self.config.hidden_size

    @property
    def num_classes(self) -> int:
        """None: it knows no labels."""
        return 0

    def abstract_params(self, dtype: DTypeLike) -> Any:
        """See `TextModel`."""
        return bert.abstract_params(self.config, dtype)

    def compute(self, params: Any, token_ids: jax.Array, num_tokens: jax.Array) -> jax.Array:
        """See `TextModel`."""
        return bert.embed_texts(
            params, self.config, token_ids, num_tokens, normalize=self.normalizes
        )
