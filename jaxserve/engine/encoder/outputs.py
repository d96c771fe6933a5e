"""Output side of an encoder: vectors -> RequestOutput."""

from __future__ import annotations

from jaxserve.engine.encoder.plan import EncodeUpdate
from jaxserve.engine.output import Addressed, OpenRequest, OpenRequests, OutputSink
from jaxserve.engine.request import FinishReason, Request, RequestOutput


class EmbeddingOutputs(OpenRequests[OpenRequest]):
    """Each request has a single output.

    Updates and ends of a request that is not open give nothing.
    """

    def open(self, request: Request, sink: OutputSink) -> None:
        self._open[request.request_id] = OpenRequest(request, sink)

    def update(self, update: EncodeUpdate, now_s: float) -> Addressed | None:
        """The output of a request whose step was committed at `now_s`."""
        if not self.is_open(update.request):
            return None
        entry = self._open[update.request.request_id]
        if update.vector is not None:
            self._metrics.observe_embedded(entry.request.num_prompt_tokens)
        output = RequestOutput(
            request_id=update.request.request_id,
            token_ids=(),
            text="",
            finish_reason=update.finish_reason,
            usage=self._close(entry, update.finish_reason, now_s),
            embedding=update.vector,
        )
        return Addressed(entry.sink, output)

    def end(self, request_id: str, reason: FinishReason, now_s: float) -> Addressed | None:
        """The output of a request that ends from outside a step."""
        entry = self._open.get(request_id)
        if entry is None:
            return None
        output = RequestOutput(
            request_id=request_id,
            token_ids=(),
            text="",
            finish_reason=reason,
            usage=self._close(entry, reason, now_s),
        )
        return Addressed(entry.sink, output)
