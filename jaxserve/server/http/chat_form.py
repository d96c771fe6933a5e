"""ChatForm: answers told as a chat, whole or as a stream, with the calls of tools in them."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxserve.engine.request import FinishReason, RequestOutput
from jaxserve.server.http.logprobs import chat_logprobs
from jaxserve.server.http.replies import (
    ChatChoice,
    ChatChoiceEnd,
    ChatDelta,
    ChatLogprobs,
    ChatMessage,
    Delta,
    ToolCall,
    ToolCallDelta,
    Usage,
)
from jaxserve.server.tool_calls.pieces import (
    ArgumentsPiece,
    CallStart,
    Piece,
    TextPiece,
    ToolCallParser,
    text_pieces,
)
from models.token_bytes import TokenBytes


@dataclass(slots=True)
class ChatForm:
    """Implements `Form`."""

    id: str
    model: str
    weights: str
    num_choices: int
    tells_token_ids: bool
    token_bytes: TokenBytes | None
    """None: logprobs are not told."""
    make_parser: Callable[[], ToolCallParser] | None
    """None: the answer calls no tools, whatever its text looks like."""
    created: int = field(default_factory=lambda: int(time.time()))
    parsers: dict[int, ToolCallParser] = field(default_factory=dict)
    """Of a stream's choices."""
    callers: set[int] = field(default_factory=set)
    """Choices of a stream that have called a tool."""

    def opening(self) -> Sequence[ChatDelta]:
        """See `Form`."""
        return [
            ChatDelta(
                index=index,
                delta={"role": "assistant", "content": ""},
                logprobs=None,
                finish_reason=None,
            )
            for index in range(self.num_choices)
        ]

    def delta(self, index: int, output: RequestOutput) -> ChatDelta | None:
        """See `Form`."""
        delta = _delta(self._pieces(index, output))
        if "tool_calls" in delta:
            self.callers.add(index)
        has_news = delta or output.finish_reason is not None or output.logprobs
        if not (has_news or (self.tells_token_ids and output.token_ids)):
            return None
        end = self._end(output, has_calls=index in self.callers)
        return ChatDelta(index=index, delta=delta, **end)

    def chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """See `Form`."""
        return self._envelope("chat.completion.chunk", choices)

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> Mapping[str, Any]:
        """See `Form`."""
        choices = []
        for index, output in enumerate(outputs):
            message = _message(self._pieces(index, output))
            end = self._end(output, has_calls="tool_calls" in message)
            choices.append(ChatChoice(index=index, message=message, **end))
        return self._envelope("chat.completion", choices) | {"usage": usage}

    def _pieces(self, index: int, output: RequestOutput) -> list[Piece]:
        if self.make_parser is None:
            return text_pieces(output.text)
        if index not in self.parsers:
            self.parsers[index] = self.make_parser()
        pieces = self.parsers[index].push(output.text)
        if output.finish_reason is not None:
            pieces += self.parsers[index].finish()
        return pieces

    def _envelope(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.weights,
            "choices": list(choices),
        }

    def _end(self, output: RequestOutput, *, has_calls: bool) -> ChatChoiceEnd:
        """What a chunk's choice and a whole one have in common."""
        logprobs: ChatLogprobs | None = None
        if self.token_bytes is not None:
            logprobs = chat_logprobs(output.logprobs, self.token_bytes)
        reason = None if output.finish_reason is None else output.finish_reason.value
        if has_calls and output.finish_reason is FinishReason.STOP:
            reason = "tool_calls"
        end: ChatChoiceEnd = {
            "logprobs": logprobs,
            # The enum has the values that the type lists.
            "finish_reason": reason,  # type: ignore[typeddict-item]
            "stop_reason": output.stop_match,
        }
        if self.tells_token_ids:
            end["token_ids"] = list(output.token_ids)
        return end


def _delta(pieces: Sequence[Piece]) -> Delta:
    """The pieces of one chunk, those of a call put together."""
    delta: Delta = {}
    calls: dict[int, ToolCallDelta] = {}
    for piece in pieces:
        match piece:
            case TextPiece(text):
                delta["content"] = delta.get("content", "") + text
            case CallStart(index, name):
                calls[index] = {
                    "index": index,
                    "id": _new_id(),
                    "type": "function",
                    "function": {"name": name, "arguments": ""},
                }
            case ArgumentsPiece(index, text):
                call = calls.setdefault(index, {"index": index, "function": {"arguments": ""}})
                call["function"]["arguments"] += text
    if calls:
        delta["tool_calls"] = list(calls.values())
    return delta


def _message(pieces: Sequence[Piece]) -> ChatMessage:
    delta = _delta(pieces)
    calls: list[ToolCall] = [
        {
            "id": call["id"],
            "type": "function",
            "function": {
                "name": call["function"]["name"],
                "arguments": call["function"]["arguments"],
            },
        }
        for call in delta.get("tool_calls", ())
    ]
    text = delta.get("content", "")
    message: ChatMessage = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        message["content"] = text or None
        message["tool_calls"] = calls
    return message


def _new_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"
