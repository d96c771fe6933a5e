"""POST /v1/completions: texts or token ids go on."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.engine.request import RequestOutput
from jaxserve.errors import InvalidRequest
from jaxserve.server.grammars import grammar_of
from jaxserve.server.http.answers import Questions, answer, check_stream_options
from jaxserve.server.http.logprobs import completion_logprobs
from jaxserve.server.http.prompts import as_prompts, encode_prompts
from jaxserve.server.http.replies import CompletionChoice, Usage
from jaxserve.server.http.sampling import completion_sampling
from jaxserve.server.http.schema import CompletionRequest
from jaxserve.server.http.service import HttpService, adapter_of, in_client_words
from jaxserve.server.prompt_limits import check_cache_salt
from models.token_bytes import TokenBytes

_NAMES = {"prompt_token_ids": "prompt", "request_id": "x-request-id"}


async def complete(service: HttpService, request: Request) -> Response:
    body = await service.read(request, CompletionRequest)
    serving = service.accepting(body)
    serving.require_generation()
    try:
        check_stream_options(body)
        check_cache_salt("cache_salt", body.cache_salt or "")
        sampling = completion_sampling(body)
        sampling.validate(vocab_size=serving.limits.vocab_size)
        grammar = await grammar_of(sampling.constraint, serving)
        prompts = as_prompts("prompt", body.prompt)
        encode = partial(
            serving.tokenizer.encode, add_special_tokens=body.add_special_tokens is not False
        )
        token_ids = await encode_prompts("prompt", prompts, serving, encode, service.workers)
        request_id = request.state.request_id
        adapter = adapter_of(body, serving)
        questions = Questions.of(body, token_ids, sampling, request_id, grammar, adapter)
        form = _Form(
            id=f"cmpl-{request_id}",
            model=adapter or serving.card.name,
            weights=serving.weights_name(),
            tells_token_ids=bool(body.return_token_ids),
            token_bytes=None if body.logprobs is None else TokenBytes(serving.tokenizer),
        )
        return await answer(service, request, serving, questions, body, form)
    except InvalidRequest as error:
        raise in_client_words(error, _NAMES) from error


@dataclass(slots=True)
class _Form:
    id: str
    model: str
    weights: str
    tells_token_ids: bool
    token_bytes: TokenBytes | None
    """None: logprobs are not told."""
    created: int = field(default_factory=lambda: int(time.time()))
    offsets: dict[int, int] = field(default_factory=dict)
    """Characters of a choice's tokens so far."""

    def opening(self) -> Sequence[Mapping[str, Any]]:
        return ()

    def delta(self, index: int, output: RequestOutput) -> CompletionChoice | None:
        has_news = output.text or output.finish_reason is not None or output.logprobs
        tells_ids = self.tells_token_ids and output.token_ids
        return self._choice(index, output) if has_news or tells_ids else None

    def chunk(self, choices: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.weights,
            "choices": list(choices),
        }

    def whole(self, outputs: Sequence[RequestOutput], usage: Usage) -> Mapping[str, Any]:
        choices = [self._choice(index, output) for index, output in enumerate(outputs)]
        return self.chunk(choices) | {"usage": usage}

    def _choice(self, index: int, output: RequestOutput) -> CompletionChoice:
        reason = output.finish_reason
        choice: CompletionChoice = {
            "index": index,
            "text": output.text,
            "logprobs": None,
            # The enum has the values that the type lists.
            "finish_reason": None if reason is None else reason.value,  # type: ignore[typeddict-item]
            "stop_reason": output.stop_match,
        }
        if self.token_bytes is not None:
            choice["logprobs"], self.offsets[index] = completion_logprobs(
                output.logprobs, self.token_bytes, self.offsets.get(index, 0)
            )
        if self.tells_token_ids:
            choice["token_ids"] = list(output.token_ids)
        return choice
