"""What a GGUF file's metadata says about its model: config and tokenizer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from checkpoint.errors import FormatError
from models.config import ModelConfig, RopeScaling
from models.sentencepiece_bpe import sentencepiece_bpe
from models.tokenizer import Tokenizer

ARCHITECTURES = ("llama",)
"""GGUF architectures that can be served; "llama" covers Llama, Mistral, SmolLM2."""

_TOKEN_NORMAL, _TOKEN_UNKNOWN, _TOKEN_CONTROL, _TOKEN_USER_DEFINED = 1, 2, 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of Llama 3.1 and later: what its rotary scaling comes to, per pair."""


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    rope_factors: Sequence[float] | None = None,
) -> ModelConfig:
    """ModelConfig of a GGUF file.

    Args:
        metadata: `GgufFile.metadata`.
        tensor_names: `GgufFile.names()`; some features show only there, such as
            a head tied to the embedding (no `output.weight`).
        rope_factors: the tensor `ROPE_FACTORS`, if the file has one.

    Raises FormatError for an architecture or a feature that is not supported,
    and for metadata that is missing or of the wrong type.
    """
    reader = _Reader(metadata)
    architecture = reader.text("general.architecture")
    if architecture not in ARCHITECTURES:
        raise FormatError(
            f"GGUF architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )
    if reader.integer("llama.expert_count", 0):
        raise FormatError("GGUF models with experts (llama.expert_count) are not supported")
    names = frozenset(tensor_names)
    hidden_size = reader.positive("llama.embedding_length")
    num_heads = reader.positive("llama.attention.head_count")
    num_kv_heads = reader.positive("llama.attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise FormatError(
            f"GGUF has {num_kv_heads} KV heads, which do not divide {num_heads} heads"
        )
    head_dim = reader.positive("llama.attention.key_length", hidden_size // num_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if reader.integer(key, head_dim) != head_dim:
            raise FormatError(f"GGUF {key} other than the head size {head_dim} is not supported")
    return ModelConfig(
        family="llama",
        vocab_size=_vocab_size(reader),
        hidden_size=hidden_size,
        intermediate_size=reader.positive("llama.feed_forward_length"),
        num_layers=reader.positive("llama.block_count"),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=reader.positive("llama.context_length"),
        rope_theta=reader.number("llama.rope.freq_base", 10000.0),
        rope_scaling=_rope_scaling(reader, head_dim, rope_factors),
        rms_norm_eps=reader.number("llama.attention.layer_norm_rms_epsilon"),
        tie_word_embeddings="output.weight" not in names,
        attention_bias="blk.0.attn_q.bias" in names,
        mlp_bias="blk.0.ffn_up.bias" in names,
        sliding_window=reader.integer("llama.attention.sliding_window", 0) or None,
        bos_token_id=_bos_token_id(reader),
        eos_token_ids=_eos_token_ids(reader),
    )


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Tokenizer of a GGUF file, from `tokenizer.ggml.*` and `tokenizer.chat_template`.

    Raises FormatError for a kind of tokenizer that is not supported, and for
    metadata that is missing or contradicts itself.
    """
    reader = _Reader(metadata)
    tokens = reader.texts("tokenizer.ggml.tokens")
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise FormatError("GGUF tokenizer.ggml.tokens holds a token twice")
    kind = reader.text("tokenizer.ggml.model")
    if kind == "gpt2":
        backend, adds_bos = _byte_level_bpe(reader, vocab)
    elif kind == "llama":
        backend, adds_bos = _sentencepiece(reader, vocab), True
    else:
        raise FormatError(
            f"GGUF tokenizer model {kind!r} is not supported, only gpt2 and llama; use the "
            "Hugging Face folder of the model instead"
        )
    _add_added_tokens(backend, reader, tokens)
    bos_token_id, eos_token_ids = _bos_token_id(reader), _eos_token_ids(reader)
    _set_post_processor(backend, reader, tokens, adds_bos, bos_token_id, eos_token_ids)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level_bpe(reader: _Reader, vocab: dict[str, int]) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether it adds a BOS when the file does not say."""
    name = reader.text("tokenizer.ggml.pre", "default")
    if name not in _PRE_TOKENIZERS:
        raise FormatError(
            f"GGUF pre-tokenizer {name!r} is not supported, only "
            f"{', '.join(sorted(_PRE_TOKENIZERS))}; use the Hugging Face folder of the model"
        )
    pre_tokenizer, is_llama3 = _PRE_TOKENIZERS[name]
    merges = [_split_merge(merge) for merge in reader.texts("tokenizer.ggml.merges")]
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=is_llama3)
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"GGUF tokenizer does not hold together: {error}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend, is_llama3


def _sentencepiece(reader: _Reader, vocab: dict[str, int]) -> tokenizers.Tokenizer:
    scores = reader.numbers("tokenizer.ggml.scores")
    types = reader.integers("tokenizer.ggml.token_type")
    if not len(vocab) == len(scores) == len(types):
        raise FormatError(
            f"GGUF tokenizer has {len(vocab)} tokens, {len(scores)} scores and "
            f"{len(types)} token types"
        )
    unknown = [token for token, token_id in vocab.items() if types[token_id] == _TOKEN_UNKNOWN]
    try:
        return sentencepiece_bpe(
            vocab,
            scores,
            [token for token, token_id in vocab.items() if types[token_id] == _TOKEN_NORMAL],
            unknown_token=unknown[0] if unknown else None,
            add_space_prefix=reader.flag("tokenizer.ggml.add_space_prefix", True),
        )
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"GGUF tokenizer does not hold together: {error}") from None


def _split_merge(merge: str) -> tuple[str, str]:
    left, separator, right = merge.partition(" ")
    if not (left and separator and right) or " " in right:
        raise FormatError(f"GGUF tokenizer merge {merge[:40]!r} is not two tokens")
    return left, right


def _split_pre_tokenizer(pattern: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
_DIGITS_THEN_GPT2 = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _GPT2])
_PRE_TOKENIZERS: Mapping[str, tuple[pre_tokenizers.PreTokenizer, bool]] = {
    "gpt-2": (_GPT2, False),
    "smollm": (_DIGITS_THEN_GPT2, False),
    "llama-bpe": (_split_pre_tokenizer(_LLAMA3_SPLIT), True),
}
"""Name in the file: how text is cut, and whether, as in Llama 3, whole known words skip
merging and a BOS is the rule."""


def _add_added_tokens(
    backend: tokenizers.Tokenizer, reader: _Reader, tokens: Sequence[str]
) -> None:
    types = reader.integers("tokenizer.ggml.token_type")
    if types and len(types) != len(tokens):
        raise FormatError(f"GGUF tokenizer has {len(tokens)} tokens and {len(types)} token types")
    for wanted, special in ((_TOKEN_CONTROL, True), (_TOKEN_USER_DEFINED, False)):
        found = [
            AddedToken(token, special=special, normalized=False)
            for token, token_type in zip(tokens, types, strict=False)
            if token_type == wanted
        ]
        if special:
            backend.add_special_tokens(found)
        else:
            backend.add_tokens(found)


def _set_post_processor(
    backend: tokenizers.Tokenizer,
    reader: _Reader,
    tokens: Sequence[str],
    adds_bos: bool,
    bos_token_id: int | None,
    eos_token_ids: Sequence[int],
) -> None:
    for token_id in (bos_token_id, *eos_token_ids):
        if token_id is not None and not 0 <= token_id < len(tokens):
            raise FormatError(f"GGUF special token id {token_id} is outside the vocabulary")
    pieces = ["$A"]
    special = []
    if reader.flag("tokenizer.ggml.add_bos_token", adds_bos) and bos_token_id is not None:
        pieces.insert(0, tokens[bos_token_id])
        special.append((tokens[bos_token_id], bos_token_id))
    if reader.flag("tokenizer.ggml.add_eos_token") and eos_token_ids:
        pieces.append(tokens[eos_token_ids[0]])
        special.append((tokens[eos_token_ids[0]], eos_token_ids[0]))
    if special:
        backend.post_processor = TemplateProcessing(single=pieces, special_tokens=special)


def _vocab_size(reader: _Reader) -> int:
    tokens = reader.metadata.get("tokenizer.ggml.tokens")
    return reader.positive("llama.vocab_size", len(tokens) if isinstance(tokens, list) else None)


def _rope_scaling(
    reader: _Reader, head_dim: int, factors: Sequence[float] | None
) -> RopeScaling | None:
    kind = reader.text("llama.rope.scaling.type", "none")
    if factors is not None:
        if kind != "none":
            raise FormatError(f"GGUF has both {ROPE_FACTORS} and rope scaling {kind!r}")
        if len(factors) != head_dim // 2 or not all(0 < f < math.inf for f in factors):
            raise FormatError(f"GGUF {ROPE_FACTORS} must hold {head_dim // 2} positive numbers")
        return RopeScaling(kind="factors", factor=1.0, factors=tuple(map(float, factors)))
    if kind == "none":
        return None
    if kind != "linear":
        raise FormatError(f"GGUF rope scaling {kind!r} is not supported, only none and linear")
    return RopeScaling(kind="linear", factor=reader.number("llama.rope.scaling.factor"))


def _bos_token_id(reader: _Reader) -> int | None:
    return reader.optional_integer("tokenizer.ggml.bos_token_id")


def _eos_token_ids(reader: _Reader) -> tuple[int, ...]:
    """The ids that end an answer: end of sequence, of turn and of message."""
    ids = (
        reader.optional_integer(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")
    )
    return tuple(dict.fromkeys(token_id for token_id in ids if token_id is not None))


class _Reader:
    """Typed access to metadata; each miss is a FormatError that names the key."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self.metadata = metadata

    def _get(self, key: str, default: Any) -> Any:
        value = self.metadata.get(key, default)
        if value is None:
            raise FormatError(f"GGUF metadata lacks {key!r}")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value = self._get(key, default)
        if not isinstance(value, str):
            raise FormatError(f"GGUF metadata {key!r} must be a string")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise FormatError(f"GGUF metadata {key!r} must be a whole number")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.integer(key, default)
        if value == 0:
            raise FormatError(f"GGUF metadata {key!r} must be positive")
        return value

    def optional_integer(self, key: str) -> int | None:
        return self.integer(key) if key in self.metadata else None

    def number(self, key: str, default: float | None = None) -> float:
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e30:
            raise FormatError(f"GGUF metadata {key!r} must be a positive number")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.metadata.get(key, default)
        if not isinstance(value, bool):
            raise FormatError(f"GGUF metadata {key!r} must be a boolean")
        return value

    def texts(self, key: str) -> list[str]:
        value = self._get(key, None)
        if not isinstance(value, list):
            raise FormatError(f"GGUF metadata {key!r} must be an array of strings")
        return value

    def integers(self, key: str) -> list[int]:
        """Whole numbers, none when the file lacks the key."""
        result: list[int] = self._array(key, "iu", "whole numbers")
        return result

    def numbers(self, key: str) -> list[float]:
        """Numbers, none when the file lacks the key."""
        result: list[float] = self._array(key, "f", "numbers")
        return result

    def _array(self, key: str, kinds: str, what: str) -> list[Any]:
        value = self.metadata.get(key)
        if value is None:
            return []
        if not isinstance(value, np.ndarray) or value.dtype.kind not in kinds:
            raise FormatError(f"GGUF metadata {key!r} must be an array of {what}")
        return list(value.tolist())
