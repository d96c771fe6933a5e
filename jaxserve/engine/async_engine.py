"""AsyncEngine: the engine as async iterators, for servers on an event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.request import GenerationRequest, Request, RequestOutput
from jaxserve.errors import EngineLost, InvalidRequest, StreamTooSlow

DEFAULT_MAX_BACKLOG_TOKENS = 4096


class Meter(Protocol):
    """Counts what tenants use; all methods run on the event loop."""

    def admit(self, request: GenerationRequest) -> None:
        """Raises QueueFull to refuse it."""
        ...

    def withdraw(self, request: GenerationRequest) -> None:
        """It was admitted and then not taken by the engine."""
        ...

    def note(self, request: GenerationRequest, output: RequestOutput) -> None: ...


class Observer(Protocol):
    """Told of requests on the event loop."""

    def ended(self, request: Request, output: RequestOutput) -> None:
        """`output` was the request's last. Must not raise."""
        ...


@dataclass(slots=True, eq=False)
class _Stream:
    """What has come in for one request and has not been read."""

    request: Request
    arrived: asyncio.Event
    """Set when an output comes in; streams with one reader share it."""
    outputs: deque[RequestOutput] = field(default_factory=deque)
    num_tokens: int = 0
    too_slow: bool = False
    lost: EngineLost | None = None

    def put(self, output: RequestOutput) -> None:
        self.outputs.append(output)
        self.num_tokens += len(output.token_ids)
        self.arrived.set()

    async def get(self) -> RequestOutput:
        while not self.outputs:
            if self.lost is not None:
                raise self.lost
            self.arrived.clear()
            await self.arrived.wait()
        return self.pop()

    def pop(self) -> RequestOutput:
        output = self.outputs.popleft()
        self.num_tokens -= len(output.token_ids)
        return output


class AsyncEngine:
    """Streams of one engine for one event loop, on which all methods run.

    The engine's thread wakes the loop once a step, for all streams together.

    Args:
        max_backlog_tokens: a stream with this many unread tokens is cancelled.
    """

    def __init__(
        self,
        engine: EngineCore,
        loop: asyncio.AbstractEventLoop,
        *,
        max_backlog_tokens: int = DEFAULT_MAX_BACKLOG_TOKENS,
    ) -> None:
        self.engine = engine
        self._sink = _LoopSink(self, loop)
        self._max_backlog_tokens = max_backlog_tokens
        self._is_lost = False
        self._meter: Meter | None = None
        self._observer: Observer | None = None
        self._streams: dict[str, _Stream] = {}
        """A stream stays until its last output is in, even if nobody reads it:
        else a new request of that id would get the old one's outputs."""

    def meter_with(self, meter: Meter) -> None:
        """From now on `meter` is asked before each request and told of each output."""
        self._meter = meter

    def observe_with(self, observer: Observer) -> None:
        """From now on `observer` is told of each request's end."""
        self._observer = observer

    @property
    def num_streams(self) -> int:
        """Requests whose last output has not come in yet."""
        return len(self._streams)

    def oldest_waiting_s(self, now_s: float) -> float:
        """How long the request has waited that no step has taken yet and that came first; 0
        without one.

        Args:
            now_s: on the engine's clock.
        """
        waiting = (
            stream.request.arrival_s
            for stream in self._streams.values()
            if stream.request.first_scheduled_s is None
        )
        return max(0.0, now_s - min(waiting, default=now_s))

    def has(self, request_id: str) -> bool:
        """Whether the last output of a request of this id has not come in yet."""
        return request_id in self._streams

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[RequestOutput, None]:
        """Yields the request's outputs; the last one has a finish reason.

        The request starts with the first `anext`, which raises InvalidRequest,
        QueueFull or NotAccepting. Closing the iterator early aborts the
        request. Raises StreamTooSlow when the caller reads too slowly, and
        EngineLost after `lose`.
        """
        stream = self._open(request)
        finished = False
        try:
            while not finished:
                output = await stream.get()
                self._check_pace(stream)
                finished = output.finish_reason is not None
                yield output
        finally:
            if not finished:
                # Not by its id: the request may have ended, unread, and
                # another one may have the id by now.
                self.engine.cancel(stream.request)

    @contextmanager
    def open(
        self, requests: Sequence[GenerationRequest]
    ) -> Iterator[AsyncIterator[tuple[int, RequestOutput]]]:
        """Starts several requests for one reader: all are taken or none.

        Gives their outputs as they come, each with the index of its request, until every
        request has had its last one. Leaving the context aborts those that have not.
        Raises InvalidRequest, QueueFull or NotAccepting; the outputs raise StreamTooSlow, and
        EngineLost after `lose`.
        """
        arrived = asyncio.Event()
        streams: list[_Stream] = []
        try:
            for request in requests:
                # Not a comprehension: after a refusal, those before it are cancelled.
                streams.append(self._open(request, arrived))  # noqa: PERF401
            yield self._merge(streams, arrived)
        finally:
            for stream in streams:
                self.engine.cancel(stream.request)

    async def _merge(
        self, streams: Sequence[_Stream], arrived: asyncio.Event
    ) -> AsyncIterator[tuple[int, RequestOutput]]:
        unfinished = dict(enumerate(streams))
        while unfinished:
            await arrived.wait()
            arrived.clear()
            for index, stream in tuple(unfinished.items()):
                while stream.outputs:
                    output = stream.pop()
                    self._check_pace(stream)
                    if output.finish_reason is not None:
                        del unfinished[index]
                    yield index, output
                if stream.lost is not None and index in unfinished:
                    raise stream.lost

    async def complete_all(self, requests: Sequence[GenerationRequest]) -> list[RequestOutput]:
        """The outputs, in order, of requests that have a single one: an encoder's.

        All are taken or none: raises InvalidRequest, QueueFull or NotAccepting.
        Cancelling the caller aborts those that are not done.
        """
        streams: list[_Stream] = []
        try:
            for request in requests:
                # Not a comprehension: after a refusal, those before it are cancelled.
                streams.append(self._open(request))  # noqa: PERF401
            return [await stream.get() for stream in streams]
        finally:
            for stream in streams:
                self.engine.cancel(stream.request)

    def _check_pace(self, stream: _Stream) -> None:
        if stream.too_slow:
            raise StreamTooSlow(
                f"{self._max_backlog_tokens} tokens were waiting to be read: read the stream faster"
            )

    def _open(self, request: GenerationRequest, arrived: asyncio.Event | None = None) -> _Stream:
        """Hands a request to the engine and keeps its stream."""
        if request.request_id in self._streams:
            raise InvalidRequest(
                "request_id", "a request with this id is running: choose another id"
            )
        # Outputs are dispatched by this loop, so none is missed here.
        record = self._add(request)
        stream = _Stream(record, arrived or asyncio.Event())
        self._streams[request.request_id] = stream
        return stream

    def _add(self, request: GenerationRequest) -> Request:
        if self._meter is None:
            return self.engine.add(request, self._sink)
        self._meter.admit(request)
        try:
            return self.engine.add(request, self._sink)
        except BaseException:
            self._meter.withdraw(request)
            raise

    def lose(self, why: str) -> None:
        """Ends all streams with EngineLost, after what has come in for them. Called on the event
        loop, when nothing can be expected from the engine's thread any more."""
        self._is_lost = True
        for stream in self._streams.values():
            stream.lost = EngineLost(why)
            stream.arrived.set()
        self._streams.clear()

    def dispatch(self, outputs: Sequence[RequestOutput]) -> None:
        """One step's outputs. Called on the event loop."""
        if self._is_lost:
            return
        for output in outputs:
            stream = self._streams[output.request_id]
            if self._meter is not None:
                self._meter.note(stream.request.generation, output)
            if output.finish_reason is not None:
                del self._streams[output.request_id]
                if self._observer is not None:
                    self._observer.ended(stream.request, output)
            stream.put(output)
            unread = output.finish_reason is None and stream.num_tokens > self._max_backlog_tokens
            if unread and not stream.too_slow:
                stream.too_slow = True
                self.engine.cancel(stream.request)


class _LoopSink:
    def __init__(self, streams: AsyncEngine, loop: asyncio.AbstractEventLoop) -> None:
        self._streams = streams
        self._loop = loop

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        self._loop.call_soon_threadsafe(self._streams.dispatch, outputs)
