"""Texts -> token ids that fit an encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from jaxserve.errors import InvalidRequest
from models.tokenizer import TokenizerError, cut

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer


class EncodedText(NamedTuple):
    """A text as an encoder takes it."""

    token_ids: tuple[int, ...]
    is_cut: bool
    """It was longer."""


def tokenize_texts(
    tokenizer: Tokenizer, texts: Sequence[str], *, max_tokens: int, truncate: bool
) -> list[EncodedText]:
    """Token ids of each text, special tokens included.

    Args:
        max_tokens: most tokens of a text.
        truncate: cut longer ones, which keep their last special token.

    Raises InvalidRequest naming the text if it is longer and must not be cut, or is
    not valid Unicode.
    """
    return [
        _tokenize(tokenizer, text, index, max_tokens=max_tokens, truncate=truncate)
        for index, text in enumerate(texts)
    ]


def _tokenize(
    tokenizer: Tokenizer, text: str, index: int, *, max_tokens: int, truncate: bool
) -> EncodedText:
    try:
        token_ids = tokenizer.encode(text)
    except TokenizerError as error:
        raise InvalidRequest(f"texts[{index}]", str(error)) from error
    if len(token_ids) <= max_tokens:
        return EncodedText(tuple(token_ids), is_cut=False)
    if not truncate:
        raise InvalidRequest(
            f"texts[{index}]",
            f"has {len(token_ids)} tokens; the model takes {max_tokens} at most: shorten the text "
            "or set truncate",
        )
    return EncodedText(cut(token_ids, max_tokens), is_cut=True)
