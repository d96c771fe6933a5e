"""open_encoder: a Hugging Face folder of a BERT-type encoder, ready to load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.typing import DTypeLike

from checkpoint.errors import FormatError
from checkpoint.formats.safetensors import SafetensorsFolder
from checkpoint.param_loading import load_params
from models import bert, bert_names
from models import hf_fields as read
from models.config import ModelConfig
from models.decoder import Params
from models.json_file import read_json, read_json_objects
from models.tokenizer import Tokenizer, cut

ARCHITECTURE = "BertModel"
POOLING = "1_Pooling/config.json"
SENTENCE_CONFIG = "sentence_bert_config.json"
MODULES = "modules.json"
KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class Encoder:
    """An encoder on disk whose config is known and whose weights are not read yet."""

    path: Path
    config: ModelConfig
    tensors: SafetensorsFolder
    max_tokens: int
    """Most tokens of a text, as the model's files say; special tokens count."""
    normalizes: bool = True
    """Its embeddings have length one."""

    def load_tokenizer(self) -> Tokenizer:
        """The encoder's tokenizer, without cutting or padding."""
        return Tokenizer.from_folder(self.path)

    def load_params(self, dtype: DTypeLike) -> Params:
        """All parameters in `dtype`, as `models.bert` lays them out."""
        abstract = bert.abstract_params(self.config, dtype)
        return load_params(self.tensors, bert_names.hf_name_table(self.config), abstract)


def is_encoder(path: str | Path) -> bool:
    """Whether this is a folder of an encoder, supported or not.

    Raises:
        FormatError: its `config.json` cannot be read.
    """
    fields = read_json(Path(path) / "config.json")
    return fields is not None and fields.get("architectures") == [ARCHITECTURE]


def open_encoder(path: str | Path) -> Encoder:
    """Read an encoder's config and tensor headers, not its weights.

    Args:
        path: a folder as `sentence-transformers` and `transformers` write it.

    Raises:
        FormatError: not an encoder, or one that is not supported; the message says why.
    """
    path = Path(path)
    fields = read_json(path / "config.json")
    if fields is None:
        raise FormatError(f"{path} holds no config.json, so it is not an encoder's folder")
    config = config_from_bert(fields)
    pooling = read_json(path / POOLING) or {"pooling_mode_mean_tokens": True}
    modes = sorted(name for name, value in pooling.items() if value is True)
    if modes not in (["pooling_mode_mean_tokens"], ["include_prompt", "pooling_mode_mean_tokens"]):
        raise FormatError(
            f"{POOLING}: {', '.join(modes)} is not supported, only the mean of tokens"
        )
    limit = (read_json(path / SENTENCE_CONFIG) or {}).get("max_seq_length")
    return Encoder(
        path=path,
        config=config,
        tensors=SafetensorsFolder(path),
        max_tokens=min(limit or config.max_position_embeddings, config.max_position_embeddings),
        normalizes=_normalizes(path),
    )


def _normalizes(path: Path) -> bool:
    """Whether the last step of the model is to make its vectors one long.

    A folder of sentence-transformers lists its steps; one of transformers has no
    list, and gets the step that the usual models have.
    """
    modules = read_json_objects(path / MODULES)
    if modules is None:
        return True
    names = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = sorted(set(names) - set(KNOWN_MODULES))
    if unknown:
        raise FormatError(
            f"{MODULES}: {', '.join(unknown)} is not supported, only {', '.join(KNOWN_MODULES)}"
        )
    return "Normalize" in names


def config_from_bert(fields: Mapping[str, Any]) -> ModelConfig:
    """ModelConfig of a `BertModel`'s `config.json`.

    Raises:
        FormatError: another architecture, or a field that is not supported.
    """
    if fields.get("architectures") != [ARCHITECTURE]:
        raise FormatError(
            f"config.json: architectures is {fields.get('architectures')!r}; the only encoder that "
            f"is supported is {ARCHITECTURE}"
        )
    read.refuse(
        fields,
        {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}
        | {"type_vocab_size": bert.NUM_TYPES, "model_type": "bert"},
        ARCHITECTURE,
    )
    hidden_size = read.positive_int(fields, "hidden_size")
    num_heads = read.positive_int(fields, "num_attention_heads")
    return ModelConfig(
        family="bert",
        vocab_size=read.positive_int(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=read.positive_int(fields, "intermediate_size"),
        num_layers=read.positive_int(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=read.head_dim(fields, hidden_size, num_heads),
        max_position_embeddings=read.positive_int(fields, "max_position_embeddings"),
        rms_norm_eps=read.positive_float(fields, "layer_norm_eps", 1e-12),
        hidden_act=read.activation(fields, "hidden_act", "gelu"),
        attention_bias=True,
        mlp_bias=True,
        rotary_dim=0,
    )


def pad_texts(
    tokenizer: Tokenizer, texts: list[str], max_tokens: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Texts as the arguments of `models.bert.embed_texts`.

    Args:
        tokenizer: the encoder's.
        texts: one or more.
        max_tokens: longer texts are cut, and keep their last special token.

    Returns:
        `(token_ids int32[B, T], num_tokens int32[B])`, T the longest text's tokens.
    """
    rows = [cut(tokenizer.encode(text), max_tokens) for text in texts]
    num_tokens = np.array([len(row) for row in rows], np.int32)
    token_ids = np.zeros((len(rows), int(num_tokens.max())), np.int32)
    for row, ids in zip(token_ids, rows, strict=True):
        row[: len(ids)] = ids
    return token_ids, num_tokens


def embed(encoder: Encoder, params: Params, texts: list[str]) -> npt.NDArray[np.float32]:
    """One vector for each text, `float32[B, E]`; longer texts are cut."""
    token_ids, num_tokens = pad_texts(encoder.load_tokenizer(), texts, encoder.max_tokens)
    vectors = bert.embed_texts(
        params,
        encoder.config,
        jnp.asarray(token_ids),
        jnp.asarray(num_tokens),
        normalize=encoder.normalizes,
    )
    return np.asarray(vectors)
