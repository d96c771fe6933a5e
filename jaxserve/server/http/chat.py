"""POST /v1/chat/completions: the assistant's next message."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.engine.request import RequestOutput
from jaxserve.errors import InvalidRequest
from jaxserve.server.http.answers import Questions, answer, check_stream_options
from jaxserve.server.http.logprobs import chat_logprobs
from jaxserve.server.http.prompts import run_tokenizer
from jaxserve.server.http.replies import (
    ChatChoice,
    ChatChoiceEnd,
    ChatDelta,
    ChatLogprobs,
    Delta,
    Usage,
)
from jaxserve.server.http.sampling import chat_sampling
from jaxserve.server.http.schema import ChatMessage, ChatRequest
from jaxserve.server.http.service import HttpService, in_client_words
from jaxserve.server.prompt_limits import check_cache_salt
from jaxserve.server.state import Serving
from models.token_bytes import TokenBytes


class Turn(NamedTuple):
    """A message as the chat template takes it."""

    role: str
    content: str


async def chat(service: HttpService, request: Request) -> Response:
    body = await service.read(request, ChatRequest)
    serving = service.accepting(body)
    serving.require_generation()
    try:
        check_stream_options(body)
        check_cache_salt("cache_salt", body.cache_salt or "")
        sampling = chat_sampling(body)
        sampling.validate(vocab_size=serving.limits.vocab_size)
        token_ids = await encode_messages(body.messages, serving, service)
        request_id = request.state.request_id
        questions = Questions.of(body, [token_ids], sampling, request_id)
        form = _Form(
            id=f"chatcmpl-{request_id}",
            model=serving.card.name,
            weights=serving.weights_name(),
            num_choices=questions.num_choices,
            tells_token_ids=bool(body.return_token_ids),
            token_bytes=TokenBytes(serving.tokenizer) if body.logprobs else None,
        )
        return await answer(service, request, serving, questions, body, form)
    except InvalidRequest as error:
        raise in_client_words(error, _names(body)) from error


def _names(body: ChatRequest) -> dict[str, str]:
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return {
        "prompt": "messages",
        "prompt_token_ids": "messages",
        "logprobs": "top_logprobs",
        "max_tokens": limit,
        "request_id": "x-request-id",
    }


async def encode_messages(
    messages: Sequence[ChatMessage], serving: Serving, service: HttpService
) -> list[int]:
    """Token ids of a chat. Raises InvalidRequest."""
    turns = [Turn(message.role, _text(message)) for message in messages]
    serving.limits.check_messages("messages", turns)

    def encode() -> list[list[int]]:
        messages = [turn._asdict() for turn in turns]
        return [serving.tokenizer.encode_chat(messages, as_text=True)]

    return (await run_tokenizer("messages", encode, service.workers))[0]


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, str):
        return message.content
    return "".join(part.text for part in message.content)


@dataclass(slots=True)
class _Form:
    id: str
    model: str
    weights: str
    num_choices: int
    tells_token_ids: bool
    token_bytes: TokenBytes | None
    """None: logprobs are not told."""
    created: int = field(default_factory=lambda: int(time.time()))

    def opening(self) -> Sequence[ChatDelta]:
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
        has_news = output.text or output.finish_reason is not None or output.logprobs
        if not (has_news or (self.tells_token_ids and output.token_ids)):
            return None
        delta: Delta = {"content": output.text} if output.text else {}
        return ChatDelta(index=index, delta=delta, **self._end(output))

    def chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return self._envelope("chat.completion.chunk", choices)

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> Mapping[str, Any]:
        choices = [
            ChatChoice(
                index=index,
                message={"role": "assistant", "content": output.text, "refusal": None},
                **self._end(output),
            )
            for index, output in enumerate(outputs)
        ]
        return self._envelope("chat.completion", choices) | {"usage": usage}

    def _envelope(self, kind: str, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.weights,
            "choices": list(choices),
        }

    def _end(self, output: RequestOutput) -> ChatChoiceEnd:
        """What a chunk's choice and a whole one have in common."""
        logprobs: ChatLogprobs | None = None
        if self.token_bytes is not None:
            logprobs = chat_logprobs(output.logprobs, self.token_bytes)
        reason = output.finish_reason
        end: ChatChoiceEnd = {
            "logprobs": logprobs,
            # The enum has the values that the type lists.
            "finish_reason": None if reason is None else reason.value,  # type: ignore[typeddict-item]
            "stop_reason": output.stop_match,
        }
        if self.tells_token_ids:
            end["token_ids"] = list(output.token_ids)
        return end
