"""The model's vocabulary as grammars see it: the bytes of every token."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llguidance import LLTokenizer, TokenizerWrapper

from models.token_bytes import TokenBytes

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer


class _Words:
    """What `TokenizerWrapper` asks of a tokenizer."""

    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_token_id: int) -> None:
        token_bytes = TokenBytes(tokenizer)
        # An id without a token has no bytes, so no grammar allows it.
        self.tokens = [token_bytes[token_id] for token_id in range(vocab_size)]
        special = {*tokenizer.special_token_ids, eos_token_id}
        self.special_token_ids = sorted(token_id for token_id in special if token_id < vocab_size)
        self.eos_token_id = eos_token_id
        self._tokenizer = tokenizer
        self._special = special
        self.greedy: LLTokenizer | None = None

    def __call__(self, text: str) -> list[int]:
        """Ids of a text that a grammar leaves no choice about, in the model's own way if that
        spells it: SentencePiece puts a space before, and special tokens are no text."""
        ids = self._tokenizer.encode(text, add_special_tokens=False)
        is_text = self._special.isdisjoint(ids) and max(ids, default=0) < len(self.tokens)
        if is_text and b"".join(self.tokens[token_id] for token_id in ids) == text.encode():
            return ids
        return [] if self.greedy is None else self.greedy.greedy_tokenize(text)


def grammar_vocabulary(tokenizer: Tokenizer, *, vocab_size: int, eos_token_id: int) -> LLTokenizer:
    """Takes about half a second for 50,000 tokens.

    Args:
        vocab_size: of the model, whose table may have more rows than the tokenizer has tokens.
        eos_token_id: what ends a text; it and special tokens are no text themselves.
    """
    words = _Words(tokenizer, vocab_size, eos_token_id)
    vocabulary = LLTokenizer(TokenizerWrapper(words))
    words.greedy = vocabulary
    return vocabulary
