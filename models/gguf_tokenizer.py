"""The tokenizer that a GGUF file's metadata describes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from checkpoint.errors import FormatError
from models.gguf_metadata import MetadataReader
from models.sentencepiece_bpe import sentencepiece_bpe
from models.tokenizer import Tokenizer

_TOKEN_NORMAL, _TOKEN_UNKNOWN, _TOKEN_CONTROL, _TOKEN_USER_DEFINED = 1, 2, 3, 4

_LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2_SPLIT = _LLAMA3_SPLIT.replace(r"\p{N}{1,3}", r"\p{N}")


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """Tokenizer of a GGUF file, from `tokenizer.ggml.*` and `tokenizer.chat_template`.

    Raises FormatError for a kind of tokenizer that is not supported, and for
    metadata that is missing or contradicts itself.
    """
    reader = MetadataReader(metadata)
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
    bos_token_id, eos_token_ids = reader.bos_token_id(), reader.eos_token_ids()
    _set_post_processor(backend, reader, tokens, adds_bos, bos_token_id, eos_token_ids)
    template = metadata.get("tokenizer.chat_template")
    return Tokenizer(
        backend,
        bos_token_id=bos_token_id,
        eos_token_ids=eos_token_ids,
        chat_template=template if isinstance(template, str) else None,
    )


def _byte_level_bpe(
    reader: MetadataReader, vocab: dict[str, int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """The tokenizer, and whether it adds a BOS when the file does not say."""
    name = reader.text("tokenizer.ggml.pre", "default")
    if name not in PRE_TOKENIZERS:
        raise FormatError(
            f"GGUF pre-tokenizer {name!r} is not supported, only "
            f"{', '.join(sorted(PRE_TOKENIZERS))}; use the Hugging Face folder of the model"
        )
    pre_tokenizer, is_llama3 = PRE_TOKENIZERS[name]
    merges = [_split_merge(merge) for merge in reader.texts("tokenizer.ggml.merges")]
    try:
        model = models.BPE(vocab=vocab, merges=merges, ignore_merges=is_llama3)
    except Exception as error:  # the library raises bare Exception
        raise FormatError(f"GGUF tokenizer does not hold together: {error}") from None
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    return backend, is_llama3


def _sentencepiece(reader: MetadataReader, vocab: dict[str, int]) -> tokenizers.Tokenizer:
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
PRE_TOKENIZERS: Mapping[str, tuple[pre_tokenizers.PreTokenizer, bool]] = {
    "gpt-2": (_GPT2, False),
    "smollm": (_DIGITS_THEN_GPT2, False),
    "qwen2": (_split_pre_tokenizer(_QWEN2_SPLIT), False),
    "llama-bpe": (_split_pre_tokenizer(_LLAMA3_SPLIT), True),
}
"""Name in the file: how text is cut, and whether, as in Llama 3, whole known words skip
merging and a BOS is the rule."""


def _add_added_tokens(
    backend: tokenizers.Tokenizer, reader: MetadataReader, tokens: Sequence[str]
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
    reader: MetadataReader,
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
