"""Messages of a chat, as the model's template takes them, and the token ids that come of them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxserve.errors import InvalidRequest
from jaxserve.server.http.prompts import run_tokenizer
from jaxserve.server.http.schema import ChatMessage, ToolCall
from jaxserve.server.http.service import HttpService
from jaxserve.server.state import Serving


class _Weight(NamedTuple):
    """What of a message counts for its limits."""

    role: str
    content: str


async def encode_messages(
    messages: Sequence[ChatMessage],
    serving: Serving,
    service: HttpService,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> list[int]:
    """Token ids of a chat. Raises InvalidRequest.

    Args:
        tools: what the template is to tell the model that it may call.
    """
    turns = [_turn(index, message) for index, message in enumerate(messages)]
    weights = [
        _Weight(message.role, turn["content"] + _calls_text(message))
        for message, turn in zip(messages, turns, strict=True)
    ]
    serving.limits.check_messages("messages", weights)
    tokenizer = serving.tokenizer

    def encode() -> list[list[int]]:
        token_ids = tokenizer.encode_chat(turns, tools=tools, as_text=True)
        if tools is not None and tokenizer.encode_chat(turns, as_text=True) == token_ids:
            raise InvalidRequest(
                "tools", "have no place in this model's chat template: leave them out"
            )
        return [token_ids]

    return (await run_tokenizer("messages", encode, service.workers))[0]


def _turn(index: int, message: ChatMessage) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": _text(index, message)}
    if message.tool_calls is not None:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": _arguments(f"messages[{index}].tool_calls[{number}]", call),
                },
            }
            for number, call in enumerate(message.tool_calls)
        ]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _text(index: int, message: ChatMessage) -> str:
    if message.content is None:
        if message.tool_calls is None:
            raise InvalidRequest(f"messages[{index}].content", "is missing")
        return ""
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


def _arguments(field: str, call: ToolCall) -> dict[str, Any]:
    """Templates write them as JSON themselves."""
    try:
        arguments = json.loads(call.function.arguments)
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{field}.function.arguments", "must be a JSON object, as text")
    return arguments


def _calls_text(message: ChatMessage) -> str:
    calls = message.tool_calls or ()
    return "".join(call.function.name + call.function.arguments for call in calls)
