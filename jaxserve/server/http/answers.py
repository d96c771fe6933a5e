"""Answers: the requests that one HTTP request makes of the engine, whole or as a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import ExitStack, aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from jaxserve.engine.request import FinishReason, GenerationRequest, RequestOutput, joined
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import InvalidRequest
from jaxserve.server.http.disconnect import unless_disconnected
from jaxserve.server.http.errors import AnswerCancelled, EngineFailure, reply_to
from jaxserve.server.http.paced_events import Event, paced_events
from jaxserve.server.http.replies import Usage, usage_of
from jaxserve.server.http.schema import MAX_CHOICES, AnswerFields, StreamOptions
from jaxserve.server.http.service import HttpService
from jaxserve.server.state import Serving

if TYPE_CHECKING:
    from jaxserve.engine.grammar.compiler import Grammar

Outputs = AsyncIterator[tuple[int, RequestOutput]]

SEED_MASK = 2**64 - 1


class Form(Protocol):
    """How answers are told: as completions or as a chat."""

    def opening(self) -> Sequence[Mapping[str, Any]]:
        """Choices that a stream tells before the first token."""
        ...

    def delta(self, index: int, output: RequestOutput) -> Mapping[str, Any] | None:
        """The choice of a stream's chunk; None when there is nothing to tell."""
        ...

    def chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """A stream's chunk, but for its usage."""
        ...

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> Mapping[str, Any]:
        """The reply, of one output a choice."""
        ...


@dataclass(frozen=True, slots=True)
class Questions:
    """Requests for `num_choices` answers to each of some prompts; those of a prompt in turn."""

    requests: tuple[GenerationRequest, ...]
    num_choices: int

    @classmethod
    def of(
        cls,
        body: AnswerFields,
        prompts: Sequence[Sequence[int]],
        sampling: SamplingParams,
        request_id: str,
        grammar: Grammar | None,
        adapter: str,
    ) -> Questions:
        """Raises InvalidRequest when they would be too many. `grammar` is of
        `sampling.constraint`; `adapter` is empty for the model alone."""
        num_choices = body.n or 1
        total = len(prompts) * num_choices
        if total > MAX_CHOICES:
            raise InvalidRequest("n", f"times the prompts is {total}; at most {MAX_CHOICES}")
        requests = []
        for index in range(total):
            prompt, choice = divmod(index, num_choices)
            of_choice = sampling
            if sampling.seed is not None:
                of_choice = replace(sampling, seed=(sampling.seed + choice) & SEED_MASK)
            requests.append(
                GenerationRequest(
                    request_id=request_id if total == 1 else f"{request_id}-{index}",
                    prompt_token_ids=tuple(prompts[prompt]),
                    sampling=of_choice,
                    cache_salt=body.cache_salt or "",
                    adapter=adapter,
                    grammar=grammar,
                )
            )
        return cls(tuple(requests), num_choices)


def check_stream_options(body: AnswerFields) -> None:
    """Raises InvalidRequest if there are some and no stream."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options", "is for streams only: set stream to true")


async def answer(
    service: HttpService,
    request: Request,
    serving: Serving,
    questions: Questions,
    body: AnswerFields,
    form: Form,
) -> Response:
    """Starts the requests and answers with what becomes of them.

    A client that leaves ends them. Raises InvalidRequest, QueueFull, NotAccepting and, for a
    whole answer, what its requests end with.
    """
    options = body.stream_options or StreamOptions()
    pacing = service.pacing.of_request(options.pacing(), lambda field: f"stream_options.{field}")
    claimed = [service.claim(request, one) for one in questions.requests]
    with ExitStack() as opened:
        outputs = opened.enter_context(serving.async_engine.open(claimed))
        if body.stream:
            events = _events(outputs, questions, form, options, request.state.request_id)
            return EventStream(paced_events(events, pacing), opened.pop_all())
        collected = await unless_disconnected(request.receive, _collect(outputs, questions))
    return JSONResponse(form.whole(collected, usage_of(collected, questions.num_choices)))


async def _collect(outputs: Outputs, questions: Questions) -> list[RequestOutput]:
    """One output a request, with all that came."""
    parts: list[list[RequestOutput]] = [[] for _ in questions.requests]
    async for index, output in outputs:
        _check_end(output)
        parts[index].append(output)
    return [joined(outputs) for outputs in parts]


def _check_end(output: RequestOutput) -> None:
    """Raises if the request came to an end that is no answer."""
    if output.finish_reason is FinishReason.ERROR:
        raise output.failure or EngineFailure
    if output.finish_reason in (FinishReason.CANCELLED, FinishReason.DEADLINE):
        raise AnswerCancelled("the answer was cut short, since it was aborted or the server stops")


async def _events(
    outputs: Outputs,
    questions: Questions,
    form: Form,
    options: StreamOptions,
    request_id: str,
) -> AsyncIterator[Event]:
    """Server-sent events, the last one `[DONE]`; or an error, after which there is none."""
    counter = _UsageCounter(questions)

    def event(
        choices: Sequence[Mapping[str, Any]], *, tells_usage: bool, num_tokens: int = 0
    ) -> Event:
        chunk = form.chunk(choices)
        if options.include_usage or options.continuous_usage_stats:
            chunk["usage"] = counter.usage() if tells_usage else None
        return Event(_event(chunk), num_tokens)

    continuous = bool(options.continuous_usage_stats)
    try:
        for choice in form.opening():
            yield event([choice], tells_usage=continuous)
        async for index, output in outputs:
            _check_end(output)
            counter.count(index, output)
            choice_or_none = form.delta(index, output)
            if choice_or_none is not None:
                num_tokens = len(output.token_ids)
                yield event([choice_or_none], tells_usage=continuous, num_tokens=num_tokens)
        if options.include_usage:
            yield event([], tells_usage=True)
    except Exception as error:  # The status is sent: the stream has to say it.
        yield Event(_event(reply_to(error, request_id).body))
        return
    yield Event(b"data: [DONE]\n\n")


def _event(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()


@dataclass(slots=True)
class _UsageCounter:
    """Tokens so far; once all requests have ended, their own usage."""

    questions: Questions
    num_output_tokens: int = 0
    ends: dict[int, RequestOutput] = field(default_factory=dict)

    def count(self, index: int, output: RequestOutput) -> None:
        self.num_output_tokens += len(output.token_ids)
        if output.usage is not None:
            self.ends[index] = output

    def usage(self) -> Usage:
        requests, num_choices = self.questions.requests, self.questions.num_choices
        if len(self.ends) == len(requests):
            return usage_of([self.ends[index] for index in range(len(requests))], num_choices)
        num_prompt = sum(len(request.prompt_token_ids) for request in requests[::num_choices])
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": self.num_output_tokens,
            "total_tokens": num_prompt + self.num_output_tokens,
        }


class EventStream(Response):
    """Sends events as they come; closes `opened` at the end, or when the client leaves."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], opened: ExitStack) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events
        self._opened = opened

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        with self._opened, suppress(ClientDisconnect):
            await unless_disconnected(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        # A generator, which its type, an iterator, does not say.
        async with aclosing(self._events) as events:  # type: ignore[type-var]
            async for event in events:
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
