"""Incremental detokenisation: token ids in, the text they add out.

The pieces of one request, joined, are what decoding all its tokens at once
gives, in the place where they stand: a word keeps the space that parts it from
the prompt. Text is held back only while its last character is incomplete.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from models.token_bytes import TokenBytes, is_byte_level

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer

# The text of a token depends on its neighbours (a leading space is stripped
# at the very start only), so decoding starts a few prompt tokens early.
_NUM_CONTEXT_TOKENS = 6
# A UTF-8 character has at most four bytes. This many tokens without a
# complete one are not a character in the making but bytes that never will be.
_MAX_HELD_TOKENS = 16
_REPLACEMENT = "\ufffd"


class Detokenizer(Protocol):
    """Text state of one request. Survives preemptions: it never looks back."""

    def push(self, token_ids: Sequence[int]) -> str:
        """Adds generated tokens and returns the text that is now complete."""
        ...

    def flush(self) -> str:
        """Returns what is left; an incomplete character becomes U+FFFD."""
        ...


class DetokenizerFactory:
    """Makes detokenizers for one tokenizer and shares its token table."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._token_bytes = TokenBytes(tokenizer) if is_byte_level(tokenizer) else None

    def create(
        self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool = True
    ) -> Detokenizer:
        """A detokenizer for the text that follows the prompt."""
        if self._token_bytes is not None:
            return ByteLevelDetokenizer(self._token_bytes, skip_special_tokens)
        context = prompt_token_ids[-_NUM_CONTEXT_TOKENS:]
        return WindowDetokenizer(self._tokenizer, context, skip_special_tokens)


class ByteLevelDetokenizer:
    """For byte-level BPE, where a token is a byte string: exact, O(1) a token."""

    def __init__(self, token_bytes: TokenBytes, skip_special_tokens: bool) -> None:
        self._token_bytes = token_bytes
        self._skipped = token_bytes.special_token_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_ids: Sequence[int]) -> str:
        return self._decoder.decode(
            b"".join(self._token_bytes[i] for i in token_ids if i not in self._skipped)
        )

    def flush(self) -> str:
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """For any decoder: decodes a short window twice and emits the difference.

    The window begins one emitted piece back, so that what a decoder does at
    the start of a text (stripping a space, say) cancels out.
    """

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int], skip_special_tokens: bool
    ) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        self._window = [i for i in context if i not in self._skipped]
        self._num_emitted = len(self._window)
        self._emitted_text = self._decode(self._window)

    def push(self, token_ids: Sequence[int]) -> str:
        # One at a time, so that the text does not depend on how tokens arrive.
        return "".join(self._push_one(i) for i in token_ids if i not in self._skipped)

    def flush(self) -> str:
        return self._advance(self._decode(self._window))

    def _push_one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        num_held = len(self._window) - self._num_emitted
        incomplete = text.endswith(_REPLACEMENT) or len(text) <= len(self._emitted_text)
        if incomplete and num_held < _MAX_HELD_TOKENS:
            return ""
        return self._advance(text)

    def _advance(self, text: str) -> str:
        piece = text[len(self._emitted_text) :]
        del self._window[: self._num_emitted]
        self._num_emitted = len(self._window)
        self._emitted_text = self._decode(self._window)
        return piece

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)
