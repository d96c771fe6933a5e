"""PromptLimits: how large the text and the token ids of a request may be.

One place for gRPC and HTTP; each names its own field.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxserve.errors import InvalidRequest

MAX_CHAT_MESSAGES = 1024
MAX_ROLE_BYTES = 64
MAX_EMBED_TEXTS = 512
"""Keeps a reply below the 4 MiB that a gRPC client accepts by default."""
MAX_CACHE_SALT_BYTES = 256
MAX_REQUEST_ID_CHARS = 128


class Message(Protocol):
    """One message of a chat."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


@dataclass(frozen=True, slots=True)
class PromptLimits:
    vocab_size: int
    max_model_len: int
    max_prompt_bytes: int
    """Of text, before it is tokenised."""
    max_texts: int = MAX_EMBED_TEXTS
    """Of one Embed: no more than the queue could ever take."""

    @classmethod
    def of_model(
        cls, vocab_size: int, max_model_len: int, max_queued_requests: int = MAX_EMBED_TEXTS
    ) -> PromptLimits:
        """A token of text rarely has more than 32 bytes; 1 MiB at most, so
        that tokenising stays a matter of a second."""
        max_prompt_bytes = min(1 << 20, max(64 << 10, 32 * max_model_len))
        max_texts = min(MAX_EMBED_TEXTS, max_queued_requests)
        return cls(vocab_size, max_model_len, max_prompt_bytes, max_texts)

    def check_text(self, field: str, text: str, unit: str = "bytes") -> None:
        """Raises InvalidRequest naming `field` if the text is too large to be tokenised."""
        at_most(field, num_bytes(field, text), self.max_prompt_bytes, unit)

    def check_token_ids(self, field: str, token_ids: Sequence[int]) -> None:
        """Raises InvalidRequest naming `field` if there are none, or too many."""
        if not token_ids:
            raise InvalidRequest(field, "must not be empty")
        at_most(field, len(token_ids), self.max_model_len, "token ids")

    def check_messages(self, field: str, messages: Sequence[Message]) -> None:
        """Raises InvalidRequest naming a part of `field`, the messages of a chat."""
        if not messages:
            raise InvalidRequest(field, "must not be empty")
        at_most(field, len(messages), MAX_CHAT_MESSAGES, "messages")
        size = 0
        for message in messages:
            if not message.role:
                raise InvalidRequest(f"{field}.role", "must not be empty, e.g. user")
            role_bytes = num_bytes(f"{field}.role", message.role)
            at_most(f"{field}.role", role_bytes, MAX_ROLE_BYTES, "bytes")
            size += num_bytes(f"{field}.content", message.content)
        at_most(f"{field}.content", size, self.max_prompt_bytes, "bytes in all")


def at_most(field: str, value: int, limit: int, unit: str) -> None:
    """Raises InvalidRequest naming `field` if `value` is above `limit`."""
    if value > limit:
        raise InvalidRequest(field, f"has {value} {unit}; at most {limit} are allowed")


def num_bytes(field: str, text: str) -> int:
    """Of UTF-8. Raises InvalidRequest for a lone surrogate, which has none."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(field, "is not valid Unicode") from None


def check_cache_salt(field: str, salt: str) -> None:
    """Raises InvalidRequest naming `field` if the salt is too long."""
    at_most(field, num_bytes(field, salt), MAX_CACHE_SALT_BYTES, "bytes")


def check_request_id(request_id: str, field: str = "request_id") -> str:
    """Returns the id, or raises InvalidRequest: 1-128 visible ASCII characters,
    so that it is safe in metadata and logs."""
    visible = all("!" <= character <= "~" for character in request_id)
    if not visible or not 1 <= len(request_id) <= MAX_REQUEST_ID_CHARS:
        raise InvalidRequest(
            field,
            f"must be 1 to {MAX_REQUEST_ID_CHARS} printable ASCII characters without spaces",
        )
    return request_id
