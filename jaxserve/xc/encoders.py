"""EncoderSpec: what turns texts into vectors, the same for points and labels."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve import model_store
from jaxserve.errors import ConfigError
from jaxserve.xc.config import EncoderConfig
from jaxserve.xc.dataset import Texts, XcDataset
from models import bag_of_embeddings, bert
from models.bag_of_embeddings import BagConfig
from models.config import ModelConfig
from models.config_json import config_from_json, config_to_json
from models.encoder_loading import Encoder, open_encoder
from models.tokenizer import Tokenizer

Tree: TypeAlias = dict[str, Any]

_WORD_EMBEDDINGS = "embed"


@dataclass(frozen=True)
class EncoderSpec:
    """An encoder's shape, which programs are compiled for.

    Attributes:
        model: the bag's or the transformer's config.
        max_tokens: most tokens of a text, without special ones.
        prefix, suffix: special tokens around a text.
    """

    model: BagConfig | ModelConfig
    max_tokens: int
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()

    @property
    def width(self) -> int:
        """D, of its vectors."""
        return self.model.width if isinstance(self.model, BagConfig) else self.model.hidden_size

    @property
    def row_size(self) -> int:
        """Numbers of a packed text."""
        return 1 + len(self.prefix) + self.max_tokens + len(self.suffix)

    def pack(self, texts: Texts, ids: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.int32]:
        """Texts as one array to move, int32[n, row_size]: number of tokens, then their ids.

        Args:
            texts: tokenised, of at most `max_tokens`.
            ids: which; a negative one becomes a text without tokens.
        """
        is_text = np.asarray(ids) >= 0
        places = np.maximum(ids, 0)
        lengths = np.where(is_text, texts.lengths[places], 0)
        packed = np.zeros((len(places), self.row_size), np.int32)
        first = 1 + len(self.prefix)
        packed[:, 0] = np.where(is_text, len(self.prefix) + lengths + len(self.suffix), 0)
        packed[:, 1:first] = self.prefix
        packed[:, first : first + self.max_tokens] = texts.tokens[places]
        for offset, token in enumerate(self.suffix):
            packed[np.arange(len(places)), first + lengths + offset] = token
        return packed

    def embed(self, params: Tree, packed: jax.Array) -> jax.Array:
        """Vectors of length one, float32[n, D]."""
        token_ids, num_tokens = packed[:, 1:], packed[:, 0]
        if isinstance(self.model, BagConfig):
            return bag_of_embeddings.embed_texts(params, token_ids, num_tokens)
        return bert.embed_texts(params, self.model, token_ids, num_tokens)

    def to_json(self) -> dict[str, Any]:
        """`from_json` is its inverse."""
        is_bag = isinstance(self.model, BagConfig)
        model = (
            asdict(self.model) if isinstance(self.model, BagConfig) else config_to_json(self.model)
        )
        fields = {"kind": "bag" if is_bag else "bert", "model": model}
        return fields | {
            "max_tokens": self.max_tokens,
            "prefix": list(self.prefix),
            "suffix": list(self.suffix),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> EncoderSpec:
        """The inverse of `to_json`."""
        fields = value["model"]
        model = BagConfig(**fields) if value["kind"] == "bag" else config_from_json(fields)
        return cls(model, value["max_tokens"], tuple(value["prefix"]), tuple(value["suffix"]))


def spec_of(config: EncoderConfig, dataset: XcDataset) -> EncoderSpec:
    """The spec of an encoder for a data set's texts. Reads headers, not weights.

    Raises:
        ConfigError: encoder and data do not fit together.
    """
    if config.kind == "bag":
        model = BagConfig(vocab_size=dataset.vocab_size, width=config.width, hidden=config.hidden)
        return EncoderSpec(model, dataset.max_tokens)
    encoder = _open(config)
    prefix, suffix = _special_tokens(Tokenizer.from_folder(dataset.tokenizer_folder))
    if dataset.vocab_size > encoder.config.vocab_size:
        raise ConfigError(
            f"xc.encoder.source is {config.source}, which knows {encoder.config.vocab_size} "
            f"tokens, but the data in {dataset.folder} has {dataset.vocab_size}: prepare it with "
            f"--tokenizer {config.source}"
        )
    spec = EncoderSpec(encoder.config, dataset.max_tokens, prefix, suffix)
    if spec.row_size - 1 > encoder.max_tokens:
        raise ConfigError(
            f"texts in {dataset.folder} have up to {dataset.max_tokens} tokens; with special ones "
            f"{config.source} takes {encoder.max_tokens}: prepare them with a lower --max-tokens"
        )
    return spec


def initial_params(config: EncoderConfig, spec: EncoderSpec, seed: int) -> Tree:
    """What training starts from: a function of the config, its source's files and the seed.

    Raises:
        ConfigError: a source that does not fit.
    """
    if isinstance(spec.model, ModelConfig):
        return _open(config).load_params(jnp.float32)
    table = None
    if config.source is not None:
        params = _open(config).load_params(jnp.float32)
        table = np.asarray(params[_WORD_EMBEDDINGS])[: spec.model.vocab_size]
        if table.shape[0] < spec.model.vocab_size or table.shape[1] < spec.model.width:
            raise ConfigError(
                f"xc.encoder.source is {config.source}, whose word embeddings are {table.shape}; "
                f"{spec.model.vocab_size} of at least {spec.model.width} numbers are needed"
            )
    return bag_of_embeddings.init_params(spec.model, jax.random.key(seed), table)


def abstract_params(spec: EncoderSpec) -> Tree:
    """The tree of `initial_params` as shapes."""
    model = spec.model
    if isinstance(model, ModelConfig):
        return bert.abstract_params(model, jnp.float32)
    shapes: Tree = jax.eval_shape(lambda: bag_of_embeddings.init_params(model, jax.random.key(0)))
    return shapes


def _open(config: EncoderConfig) -> Encoder:
    assert config.source is not None
    return open_encoder(model_store.resolve(config.source))


def _special_tokens(tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer puts before and after a text."""
    inner = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.encode("a")
    before = next(
        place for place in range(len(whole)) if whole[place : place + len(inner)] == inner
    )
    return tuple(whole[:before]), tuple(whole[before + len(inner) :])
