"""Output side: committed tokens -> text, stop strings, usage -> RequestOutput."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from jaxserve.engine.detokenizer import Detokenizer, DetokenizerFactory
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.request import FinishReason, Request, RequestOutput, TokenUpdate, Usage
from jaxserve.engine.stop_strings import StopStringMatcher


class OutputSink(Protocol):
    """Where the outputs of a front end's requests go."""

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Called from the engine's thread, at most once a step, with all that
        the step gave to the requests of this sink. Must not block."""
        ...


@dataclass(frozen=True, slots=True)
class Addressed:
    """An output and where it goes."""

    sink: OutputSink
    output: RequestOutput


@dataclass(slots=True)
class OpenRequest:
    """A request that has not had its last output."""

    request: Request
    sink: OutputSink
    num_tokens: int = field(default=0, kw_only=True)
    """Of output, so far."""
    first_token_s: float | None = field(default=None, kw_only=True)


Open = TypeVar("Open", bound=OpenRequest)


class OpenRequests(Generic[Open]):
    """Sees that each request ends exactly once: it is open until its last output."""

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._open: dict[str, Open] = {}

    @property
    def num_open(self) -> int:
        return len(self._open)

    def open_ids(self) -> list[str]:
        return list(self._open)

    def has(self, request_id: str) -> bool:
        """Whether a request of this id is open."""
        return request_id in self._open

    def is_open(self, request: Request) -> bool:
        """Whether this very request (not another of its id) is open."""
        entry = self._open.get(request.request_id)
        return entry is not None and entry.request is request

    def _close(self, entry: Open, reason: FinishReason, now_s: float) -> Usage:
        request = entry.request
        del self._open[request.request_id]
        scheduled_s = now_s if request.first_scheduled_s is None else request.first_scheduled_s
        usage = Usage(
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=entry.num_tokens,
            num_cached_tokens=request.num_cached_tokens,
            queue_s=scheduled_s - request.arrival_s,
            ttft_s=0.0 if entry.first_token_s is None else entry.first_token_s - request.arrival_s,
            e2e_s=now_s - request.arrival_s,
        )
        self._metrics.observe_finished(reason, usage)
        return usage


@dataclass(slots=True)
class _OpenText(OpenRequest):
    """Output state of a request that generates text."""

    detokenizer: Detokenizer
    matcher: StopStringMatcher
    last_token_s: float = 0.0

    def text_of(self, token_id: int) -> str:
        """Text that may leave now that this token is in."""
        return self._pass(self.detokenizer.push((token_id,)))

    def tail(self) -> str:
        """What was held back, at the end."""
        text = self._pass(self.detokenizer.flush())
        return text if self.matcher.matched is not None else text + self.matcher.flush()

    def _pass(self, text: str) -> str:
        # A stop string begins after the min_tokens-th token, like a stop id.
        if self.num_tokens <= self.request.sampling.min_tokens:
            return text
        return self.matcher.push(text)


class OutputProcessor(OpenRequests[_OpenText]):
    """Turns updates into outputs and sees that each request ends exactly once.

    A request is open from `open` to the output that carries its finish
    reason. Updates and ends of a request that is not open give nothing.
    """

    def __init__(self, detokenizers: DetokenizerFactory, metrics: EngineMetrics) -> None:
        super().__init__(metrics)
        self._detokenizers = detokenizers

    def open(self, request: Request, sink: OutputSink) -> None:
        sampling = request.sampling
        self._open[request.request_id] = _OpenText(
            request,
            sink,
            self._detokenizers.create(
                request.generation.prompt_token_ids,
                skip_special_tokens=sampling.skip_special_tokens,
            ),
            StopStringMatcher(sampling.stop, include_in_output=sampling.include_stop_str_in_output),
        )

    def update(self, update: TokenUpdate, now_s: float) -> Addressed | None:
        """One step's tokens of one request, committed at `now_s`.

        The output carries a finish reason when the update does or when a stop
        string was met; the caller then ends the request at the scheduler.
        """
        if not self.is_open(update.request):
            return None
        entry = self._open[update.request.request_id]
        num_tokens, text = self._take_tokens(entry, update)
        reason = update.finish_reason
        if reason is not None and entry.matcher.matched is None:
            text += entry.tail()
        if entry.matcher.matched is not None:
            reason = FinishReason.STOP
        self._observe_tokens(entry, num_tokens, now_s)
        output = RequestOutput(
            request_id=update.request.request_id,
            token_ids=update.token_ids[:num_tokens],
            text=text,
            logprobs=update.logprobs[:num_tokens],
            prompt_logprobs=update.prompt_logprobs,
            finish_reason=reason,
            stop_match=entry.matcher.matched or update.stop_token_id,
            usage=None if reason is None else self._close(entry, reason, now_s),
        )
        return Addressed(entry.sink, output)

    def end(self, request_id: str, reason: FinishReason, now_s: float) -> Addressed | None:
        """The last output of a request that ends from outside a step."""
        entry = self._open.get(request_id)
        if entry is None:
            return None
        # After a failure the text state may be what failed.
        text = "" if reason is FinishReason.ERROR else entry.tail()
        output = RequestOutput(
            request_id=request_id,
            token_ids=(),
            text=text,
            finish_reason=reason,
            usage=self._close(entry, reason, now_s),
            failure=entry.request.failure if reason is FinishReason.ERROR else None,
        )
        return Addressed(entry.sink, output)

    def _take_tokens(self, entry: _OpenText, update: TokenUpdate) -> tuple[int, str]:
        """How many of the update's tokens count, and the text that may leave."""
        pieces = []
        num_text_tokens = len(update.token_ids)
        if update.stop_token_id is not None and not (
            entry.request.sampling.include_stop_str_in_output
        ):
            num_text_tokens -= 1  # A stop token shows in the ids only.
        for index, token_id in enumerate(update.token_ids):
            entry.num_tokens += 1
            if index < num_text_tokens:
                pieces.append(entry.text_of(token_id))
            if entry.matcher.matched is not None:
                return index + 1, "".join(pieces)
        return len(update.token_ids), "".join(pieces)

    def _observe_tokens(self, entry: _OpenText, num_tokens: int, now_s: float) -> None:
        if num_tokens == 0:
            return
        request = entry.request
        if entry.first_token_s is None:
            entry.first_token_s = now_s
            self._metrics.observe_first_tokens(
                num_tokens,
                num_prompt_tokens=request.num_prompt_tokens,
                ttft_s=now_s - request.arrival_s,
            )
        else:
            self._metrics.observe_tokens(num_tokens, since_last_s=now_s - entry.last_token_s)
        entry.last_token_s = now_s
