"""The engine without a server: requests from this process, answers in order."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.request import (
    FinishReason,
    GenerationRequest,
    Request,
    RequestOutput,
    TokenLogprobs,
    Usage,
)
from jaxserve.errors import QueueFull


@dataclass(frozen=True, slots=True)
class Completion:
    """All outputs of one request, joined."""

    request_id: str
    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...]
    prompt_logprobs: tuple[TokenLogprobs, ...]
    finish_reason: FinishReason
    stop_match: str | int | None
    usage: Usage
    embedding: npt.NDArray[np.float32] | None = None
    """`[E]`, an encoder's whole answer."""


class QueueSink:
    """Hands outputs to another thread, a step's worth at a time."""

    def __init__(self) -> None:
        self._batches: queue.SimpleQueue[Sequence[RequestOutput]] = queue.SimpleQueue()

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        self._batches.put(outputs)

    def take(self) -> Sequence[RequestOutput]:
        """Waits for the next batch."""
        return self._batches.get()


def stream(engine: EngineCore, request: GenerationRequest) -> Iterator[RequestOutput]:
    """The outputs of one request. Leaving early aborts it."""
    sink = QueueSink()
    added = engine.add(request, sink)
    finished = False
    try:
        while not finished:
            for output in sink.take():
                finished = output.finish_reason is not None
                yield output
    finally:
        if not finished:
            engine.cancel(added)


def complete_in_order(
    engine: EngineCore, requests: Iterable[GenerationRequest], *, max_ahead: int
) -> Iterator[Completion]:
    """Runs requests with distinct ids together and yields them in their order.

    At most `max_ahead` requests are between the oldest that is not done and
    the newest that was added, which bounds the memory of a long job. Leaving
    early aborts what runs.
    """
    sink = QueueSink()
    source = iter(requests)
    held_back: GenerationRequest | None = None
    ahead: deque[str] = deque()
    added: dict[str, Request] = {}
    outputs: dict[str, list[RequestOutput]] = {}
    done: dict[str, Completion] = {}
    try:
        while True:
            while len(ahead) < max_ahead:
                request = held_back or next(source, None)
                held_back = None
                if request is None:
                    break
                try:
                    added[request.request_id] = engine.add(request, sink)
                except QueueFull:
                    if not outputs:  # Others fill the queue: waiting here could be for ever.
                        raise
                    held_back = request
                    break
                ahead.append(request.request_id)
                outputs[request.request_id] = []
            if not ahead:
                return
            for output in sink.take():
                request_id = output.request_id
                outputs[request_id].append(output)
                if output.finish_reason is not None:
                    done[request_id] = join_outputs(outputs.pop(request_id))
                    del added[request_id]
            while ahead and ahead[0] in done:
                yield done.pop(ahead.popleft())
    finally:
        for record in added.values():
            engine.cancel(record)


def join_outputs(outputs: Sequence[RequestOutput]) -> Completion:
    """All outputs of one request, of which the last is the final one."""
    last = outputs[-1]
    if last.finish_reason is None or last.usage is None:
        raise ValueError("the last output has no finish reason")
    return Completion(
        request_id=last.request_id,
        token_ids=tuple(token_id for output in outputs for token_id in output.token_ids),
        text="".join(output.text for output in outputs),
        logprobs=tuple(entry for output in outputs for entry in output.logprobs),
        prompt_logprobs=tuple(entry for output in outputs for entry in output.prompt_logprobs),
        finish_reason=last.finish_reason,
        stop_match=last.stop_match,
        usage=last.usage,
        embedding=last.embedding,
    )
