"""Logprobs in the two shapes of OpenAI's: of chats and of completions."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.engine.request import TokenLogprobs
from jaxserve.server.http.replies import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)
from models.token_bytes import TokenBytes


def chat_logprobs(entries: Sequence[TokenLogprobs], token_bytes: TokenBytes) -> ChatLogprobs:
    def named(token_id: int, logprob: float) -> TopLogprob:
        raw = token_bytes[token_id]
        return {"token": _text(raw), "logprob": logprob, "bytes": list(raw)}

    content = [
        TokenLogprob(
            **named(entry.token_id, entry.logprob),
            top_logprobs=[named(token_id, logprob) for token_id, logprob in entry.top],
        )
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(
    entries: Sequence[TokenLogprobs], token_bytes: TokenBytes, start: int
) -> tuple[CompletionLogprobs, int]:
    """`start` counts the characters of the tokens before these; the second result, after them."""
    tokens, offsets, tops = [], [], []
    for entry in entries:
        token = _text(token_bytes[entry.token_id])
        tokens.append(token)
        offsets.append(start)
        start += len(token)
        top = {_text(token_bytes[token_id]): logprob for token_id, logprob in entry.top}
        # The token itself is told, also when it is not among the most likely ones.
        tops.append(top | {token: entry.logprob})
    logprobs: CompletionLogprobs = {
        "tokens": tokens,
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
    return logprobs, start


def _text(raw: bytes) -> str:
    return raw.decode(errors="replace")
