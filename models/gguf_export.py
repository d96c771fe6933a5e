"""The metadata of a GGUF file for a model: the inverse of `gguf_model`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from gguf.constants import GGUFValueType as Kind

from checkpoint.errors import FormatError
from checkpoint.formats.gguf_writer import GgufValue
from models.config import ModelConfig
from models.gguf_config_export import config_metadata, count, text
from models.gguf_tokenizer import PRE_TOKENIZERS, tokenizer_from_gguf
from models.tokenizer import Tokenizer

QUANTIZATION_VERSION = 2
FILE_TYPES = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "BF16": 32,
}
"""llama.cpp's numbers for what most tensors are stored as."""
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_KEPT_PREFIXES = ("tokenizer.", "general.")
_REPLACED = (
    "general.architecture",
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
)


def gguf_metadata(
    config: ModelConfig,
    quantization: str,
    *,
    name: str,
    tokenizer: Tokenizer | None,
    carried: Mapping[str, Any] | None,
) -> dict[str, GgufValue]:
    """All metadata of the file.

    Args:
        config: of the model.
        quantization: a key of FILE_TYPES.
        name: for people.
        tokenizer: without one llama.cpp cannot load the file.
        carried: metadata of the GGUF file that the model came from; its tokenizer, name and
            licence are then taken over as they are.

    Raises:
        FormatError: the config or the tokenizer has no form in GGUF; the message says why.
    """
    metadata = {
        **config_metadata(config),
        "general.type": text("model"),
        "general.name": text(name),
        "general.quantization_version": count(QUANTIZATION_VERSION),
        "general.file_type": count(FILE_TYPES[quantization]),
    }
    if carried is not None:
        metadata |= {
            key: _typed(key, value)
            for key, value in carried.items()
            if key.startswith(_KEPT_PREFIXES) and key not in _REPLACED
        }
    elif tokenizer is not None:
        metadata |= _tokenizer_metadata(tokenizer, config)
    return metadata


def _tokenizer_metadata(tokenizer: Tokenizer, config: ModelConfig) -> dict[str, GgufValue]:
    described = json.loads(tokenizer.backend.to_str())
    model = described["model"]
    if model.get("type") != "BPE":
        raise FormatError(
            f"the tokenizer is a {model.get('type')}, and GGUF takes byte-pair encoding only here"
        )
    tokens, types = _tokens(tokenizer, config, model)
    values = {
        "tokens": GgufValue(Kind.STRING, tokens, is_array=True),
        "token_type": GgufValue(Kind.INT32, types, is_array=True),
    }
    merges = [_merge_text(merge) for merge in model["merges"]]
    if model.get("byte_fallback"):
        values |= _sentencepiece(described, tokens, types)
    elif not merges:
        raise FormatError("the tokenizer has no merges, and a GGUF file must hold some")
    else:
        values["model"] = text("gpt2")
        values["pre"] = text(_pre_tokenizer_name(described))
        values["merges"] = GgufValue(Kind.STRING, merges, is_array=True)
    values |= _special_ids(tokenizer)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    if tokenizer.chat_template:
        metadata["tokenizer.chat_template"] = text(tokenizer.chat_template)
    _check_same(tokenizer, metadata)
    return metadata


def _tokens(
    tokenizer: Tokenizer, config: ModelConfig, model: Mapping[str, Any]
) -> tuple[list[str], list[int]]:
    """Every id's text and kind; ids that only pad the model's table are marked unused."""
    by_id = {token_id: token for token, token_id in tokenizer.backend.get_vocab().items()}
    if by_id and max(by_id) >= config.vocab_size:
        raise FormatError(
            f"the tokenizer has the id {max(by_id)}, and the model's vocabulary ends at "
            f"{config.vocab_size - 1}"
        )
    added = tokenizer.backend.get_added_tokens_decoder()
    is_sentencepiece = bool(model.get("byte_fallback"))
    tokens, types = [], []
    for token_id in range(config.vocab_size):
        token = by_id.get(token_id)
        kind = _NORMAL
        if token is None:
            token, kind = f"[PAD{token_id}]", _UNUSED
        elif is_sentencepiece and token == model.get("unk_token"):
            kind = _UNKNOWN
        elif token_id in added:
            kind = _CONTROL if added[token_id].special else _USER_DEFINED
        elif is_sentencepiece and len(token) == 6 and token.startswith("<0x"):
            kind = _BYTE
        tokens.append(token)
        types.append(kind)
    return tokens, types


def _sentencepiece(
    described: Mapping[str, Any], tokens: list[str], types: list[int]
) -> dict[str, GgufValue]:
    """Scores that give the merges' order back: a piece is as good as its first merge."""
    rank: dict[str, int] = {}
    for index, merge in enumerate(described["model"]["merges"]):
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        rank.setdefault(left + right, index)
    last = len(described["model"]["merges"]) + 1
    scores = [
        -float(rank.get(token, last)) if kind == _NORMAL else 0.0
        for token, kind in zip(tokens, types, strict=True)
    ]
    prefix = "Prepend" in json.dumps(described.get("normalizer"))
    return {
        "model": text("llama"),
        "scores": GgufValue(Kind.FLOAT32, scores, is_array=True),
        "add_space_prefix": GgufValue(Kind.BOOL, prefix),
    }


def _pre_tokenizer_name(described: Mapping[str, Any]) -> str:
    wanted = _plain_pre_tokenizer(described.get("pre_tokenizer"))
    if described.get("normalizer") is None:
        for name, (known, _) in PRE_TOKENIZERS.items():
            if _plain_pre_tokenizer(json.loads(known.__getstate__())) == wanted:
                return name
    raise FormatError(
        "the tokenizer cuts text in a way that GGUF has no name for here; supported are "
        f"{', '.join(sorted(PRE_TOKENIZERS))}"
    )


def _plain_pre_tokenizer(value: Any) -> Any:
    """Without what does not change the ids."""
    if isinstance(value, dict):
        kept = {key: _plain_pre_tokenizer(inner) for key, inner in value.items()}
        kept.pop("trim_offsets", None)
        return kept
    if isinstance(value, list):
        return [_plain_pre_tokenizer(inner) for inner in value]
    return value


def _special_ids(tokenizer: Tokenizer) -> dict[str, GgufValue]:
    values: dict[str, GgufValue] = {}
    if tokenizer.bos_token_id is not None:
        values["bos_token_id"] = count(tokenizer.bos_token_id)
    names = ("eos", "eot", "eom")
    if len(tokenizer.eos_token_ids) > len(names):
        raise FormatError(
            f"the model ends at {len(tokenizer.eos_token_ids)} tokens; GGUF has names for 3"
        )
    for name, token_id in zip(names, tokenizer.eos_token_ids, strict=False):
        values[f"{name}_token_id"] = count(token_id)
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    ends = tokenizer.eos_token_ids[:1]
    adds_bos = full[:1] == [tokenizer.bos_token_id] and full[:1] != bare[:1]
    adds_eos = bool(ends) and full[-1:] == list(ends) and full[-1:] != bare[-1:]
    if [*full[:1][: int(adds_bos)], *bare, *ends[: int(adds_eos)]] != full:
        raise FormatError("the tokenizer adds other special tokens than a BOS and an EOS")
    values["add_bos_token"] = GgufValue(Kind.BOOL, adds_bos)
    values["add_eos_token"] = GgufValue(Kind.BOOL, adds_eos)
    return values


def _check_same(tokenizer: Tokenizer, metadata: Mapping[str, GgufValue]) -> None:
    """The file's tokenizer must be this one: same merges in the same order, same settings."""
    read = tokenizer_from_gguf({key: _as_read(value) for key, value in metadata.items()})
    ours, theirs = (json.loads(one.backend.to_str())["model"] for one in (tokenizer, read))
    merges = [[_merge_text(merge) for merge in model["merges"]] for model in (ours, theirs)]
    same_ids = read.bos_token_id == tokenizer.bos_token_id
    if merges[0] != merges[1] or not same_ids or read.eos_token_ids != tokenizer.eos_token_ids:
        raise FormatError(
            "the tokenizer would not be the same in a GGUF file; convert from a source whose "
            "tokenizer is byte-level BPE, or from the model's own GGUF file"
        )


def _as_read(value: GgufValue) -> Any:
    if value.is_array and value.kind is not Kind.STRING:
        return np.array(value.value, np.float32 if value.kind is Kind.FLOAT32 else np.int32)
    return value.value


def _typed(key: str, value: Any) -> GgufValue:
    """A value that was read from a file, with the type that converters give it."""
    if isinstance(value, bool):
        return GgufValue(Kind.BOOL, value)
    if isinstance(value, str):
        return text(value)
    if isinstance(value, int):
        return GgufValue(Kind.UINT32 if 0 <= value < 2**32 else Kind.INT64, value)
    if isinstance(value, float):
        return GgufValue(Kind.FLOAT32, value)
    if isinstance(value, list):
        return GgufValue(Kind.STRING, value, is_array=True)
    if isinstance(value, np.ndarray) and value.size:
        kinds = {"f": Kind.FLOAT32, "i": Kind.INT32, "u": Kind.UINT32, "b": Kind.BOOL}
        return GgufValue(kinds[value.dtype.kind], value.tolist(), is_array=True)
    raise FormatError(f"GGUF metadata {key!r} holds {type(value).__name__}, which is not carried")


def _merge_text(merge: Any) -> str:
    return merge if isinstance(merge, str) else f"{merge[0]} {merge[1]}"
