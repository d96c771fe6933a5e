"""EncoderEngine: tokenised texts in, embeddings out."""

from __future__ import annotations

import time
from collections.abc import Callable

from jaxserve.engine.encoder.outputs import EmbeddingOutputs
from jaxserve.engine.encoder.scheduler import EncoderScheduler
from jaxserve.engine.engine_core import EngineCore
from jaxserve.engine.loop import StepExecutor
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.request import GenerationRequest, Request
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import InvalidRequest

_NO_SAMPLING = SamplingParams()


class EncoderEngine(EngineCore):
    """Each request is one text; its only output carries the embedding.

    Args:
        max_tokens: most tokens of a text, special ones included.
        vocab_size: every id is below it.
    """

    def __init__(
        self,
        scheduler: EncoderScheduler,
        executor: StepExecutor,
        *,
        max_tokens: int,
        vocab_size: int,
        max_queued_requests: int,
        max_queued_tokens: int,
        clock: Callable[[], float] = time.monotonic,
        count_compiles: Callable[[], int] = lambda: 0,
    ) -> None:
        metrics = EngineMetrics()
        super().__init__(
            scheduler,
            executor,
            EmbeddingOutputs(metrics),
            metrics,
            max_queued_requests=max_queued_requests,
            max_queued_tokens=max_queued_tokens,
            clock=clock,
            count_compiles=count_compiles,
        )
        self.max_tokens = max_tokens
        self._vocab_size = vocab_size

    def validate(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest naming the field, unless it can be embedded."""
        token_ids = request.prompt_token_ids
        if not request.request_id:
            raise InvalidRequest("request_id", "must not be empty")
        if request.sampling != _NO_SAMPLING:
            raise InvalidRequest("sampling", "an encoder draws no tokens: leave it out")
        if not token_ids:
            raise InvalidRequest("texts", "a text must have at least one token")
        if min(token_ids) < 0 or max(token_ids) >= self._vocab_size:
            raise InvalidRequest("texts", f"every token id must be in [0, {self._vocab_size})")
        if len(token_ids) > self.max_tokens:
            raise InvalidRequest(
                "texts", f"{len(token_ids)} tokens are more than the {self.max_tokens} of a text"
            )

    def _record(self, request: GenerationRequest) -> Request:
        return Request(
            generation=request,
            max_tokens=0,
            seed=0,
            stop_token_ids=frozenset(),
            arrival_s=self._clock(),
        )
