"""Encoder: records of text or chat to token ids."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxserve.trainer.data.chat_spans import (
    ConversationError,
    check_messages,
    encode_conversation,
)
from models.tokenizer import Tokenizer, TokenizerError

LEFT_OUT = -1
"""The length of a record that is not taken."""


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What a worker process is told.

    Attributes:
        kind: "text" or "chat".
        max_tokens: of a conversation: one row, T + 1.
        overlong: "truncate" or "drop", for longer conversations.
    """

    kind: str
    max_tokens: int
    overlong: str


@dataclass(frozen=True, slots=True)
class Item:
    """One record to encode; see sources.Record."""

    value: Any
    is_start: bool
    is_end: bool


@dataclass(frozen=True, slots=True)
class Encoded:
    """A block of records, encoded.

    Attributes:
        lengths: tokens of each record, int32, or LEFT_OUT.
        tokens: of all records, one after the other, uint32.
        weights: 1 where a token is to be learnt, uint8; empty for text.
        counts: records left out or cut, by reason.
    """

    lengths: npt.NDArray[np.int32]
    tokens: npt.NDArray[np.uint32]
    weights: npt.NDArray[np.uint8]
    counts: dict[str, int]


class RecordError(Exception):
    """A record that ends the preparation: its number in the block, and what is wrong."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


class Encoder:
    """Encodes blocks of records.

    Text is taken as it is: a special token spelled out in it is text. A document begins
    with BOS where the model's prompts do, and ends with EOS.

    Raises TokenizerError: the tokenizer has no end token, or no chat template for chats.
    """

    def __init__(self, tokenizer: Tokenizer, settings: EncoderSettings) -> None:
        self._tokenizer = tokenizer
        self._settings = settings
        check_tokenizer(tokenizer, settings.kind)
        self._is_chat = settings.kind == "chat"
        self._start_ids = _start_ids(tokenizer)
        self._special_texts = _special_texts(tokenizer)
        tokenizer.backend.encode_special_tokens = not self._is_chat

    def encode(self, items: Sequence[Item]) -> Encoded:
        """Token ids of a block. Raises RecordError for the first record that is malformed."""
        counts: dict[str, int] = {}
        lengths = np.zeros(len(items), np.int32)
        tokens: list[int] = []
        weights: list[bool] = []
        for number, item in enumerate(items):
            try:
                ids, is_answer = self._encode_item(item, counts)
            except (ConversationError, TokenizerError) as error:
                raise RecordError(number, str(error)) from None
            lengths[number] = LEFT_OUT if ids is None else len(ids)
            tokens += ids or []
            weights += is_answer
        return Encoded(lengths, np.array(tokens, np.uint32), np.array(weights, np.uint8), counts)

    def _encode_item(
        self, item: Item, counts: dict[str, int]
    ) -> tuple[list[int] | None, list[bool]]:
        if self._is_chat:
            return self._encode_chat(item.value, counts)
        if not isinstance(item.value, str):
            raise ConversationError(f"text is needed, not {type(item.value).__name__}")
        if item.is_start and item.is_end and not item.value.strip():
            _count(counts, "empty")
            return None, []
        ids = self._tokenizer.encode(item.value, add_special_tokens=False)
        if item.is_start:
            ids = self._start_ids + ids
        if item.is_end:
            ids.append(self._tokenizer.eos_token_ids[0])
        return ids, []

    def _encode_chat(
        self, value: Any, counts: dict[str, int]
    ) -> tuple[list[int] | None, list[bool]]:
        messages = check_messages(value, self._special_texts)
        encoded = encode_conversation(self._tokenizer, messages)
        ids, is_answer = encoded.ids, encoded.is_answer
        if len(ids) > self._settings.max_tokens:
            if self._settings.overlong == "drop":
                _count(counts, "overlong_dropped")
                return None, []
            ids, is_answer = (
                ids[: self._settings.max_tokens],
                is_answer[: self._settings.max_tokens],
            )
            if not any(is_answer[1:]):
                _count(counts, "overlong_before_answer")
                return None, []
            _count(counts, "overlong_truncated")
        is_answer[0] = False  # nothing comes before it that could predict it
        return ids, is_answer


def check_tokenizer(tokenizer: Tokenizer, kind: str) -> None:
    """Raises TokenizerError: no end token, or no chat template for chats."""
    if not tokenizer.eos_token_ids:
        raise TokenizerError("the tokenizer has no end-of-text token; documents need one")
    if kind == "chat" and not tokenizer.has_chat_template:
        raise TokenizerError(
            "the tokenizer has no chat template; take an instruct model's, or --kind text"
        )


def tokenizer_digest(tokenizer: Tokenizer) -> str:
    """SHA-256 of all of a tokenizer that decides about token ids, chat template included."""
    content = [
        tokenizer.backend.to_str(),
        tokenizer.bos_token_id,
        list(tokenizer.eos_token_ids),
        tokenizer.chat_template,
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _start_ids(tokenizer: Tokenizer) -> list[int]:
    """What the tokenizer puts before every prompt, if it is BOS."""
    ids = tokenizer.encode("")
    return ids[:1] if ids[:1] == [tokenizer.bos_token_id] else []


def _special_texts(tokenizer: Tokenizer) -> list[str]:
    tokens = tokenizer.backend.get_added_tokens_decoder().items()
    return sorted(token.content for _, token in tokens if token.special)


def _count(counts: dict[str, int], reason: str) -> None:
    counts[reason] = counts.get(reason, 0) + 1
