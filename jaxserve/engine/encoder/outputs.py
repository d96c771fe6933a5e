"""Output side of an encoder: vectors -> RequestOutput."""

from __future__ import annotations

from jaxserve.engine.encoder.plan import EncodeUpdate
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.output import Addressed, OutputSink
from jaxserve.engine.request import FinishReason, Request, RequestOutput, Usage


class EmbeddingOutputs:
    """Sees that each request ends exactly once, with one output.

    A request is open from `open` to its output. Updates and ends of a request
    that is not open give nothing.
    """

    def __init__(self, metrics: EngineMetrics) -> None:
        self._metrics = metrics
        self._open: dict[str, tuple[Request, OutputSink]] = {}

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
        return entry is not None and entry[0] is request

    def open(self, request: Request, sink: OutputSink) -> None:
        self._open[request.request_id] = (request, sink)

    def update(self, update: EncodeUpdate, now_s: float) -> Addressed | None:
        """The output of a request whose step was committed at `now_s`."""
        if not self.is_open(update.request):
            return None
        request, sink = self._open[update.request.request_id]
        if update.vector is not None:
            self._metrics.observe_embedded(request.num_prompt_tokens)
        output = RequestOutput(
            request_id=request.request_id,
            token_ids=(),
            text="",
            finish_reason=update.finish_reason,
            usage=self._close(request, update.finish_reason, now_s),
            embedding=update.vector,
        )
        return Addressed(sink, output)

    def end(self, request_id: str, reason: FinishReason, now_s: float) -> Addressed | None:
        """The output of a request that ends from outside a step."""
        if request_id not in self._open:
            return None
        request, sink = self._open[request_id]
        output = RequestOutput(
            request_id=request_id,
            token_ids=(),
            text="",
            finish_reason=reason,
            usage=self._close(request, reason, now_s),
        )
        return Addressed(sink, output)

    def _close(self, request: Request, reason: FinishReason, now_s: float) -> Usage:
        del self._open[request.request_id]
        scheduled_s = now_s if request.first_scheduled_s is None else request.first_scheduled_s
        usage = Usage(
            num_prompt_tokens=request.num_prompt_tokens,
            num_output_tokens=0,
            num_cached_tokens=0,
            queue_s=scheduled_s - request.arrival_s,
            ttft_s=0.0,
            e2e_s=now_s - request.arrival_s,
        )
        self._metrics.observe_finished(reason, usage)
        return usage
