"""Sampling settings of a body: the engine's own schema, with OpenAI's other names for some."""

from __future__ import annotations

from typing import Any

from jaxserve.engine.sampling_json import SAMPLING_FIELDS, sampling_from_json
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import InvalidRequest
from jaxserve.server.http.errors import HttpRefusal
from jaxserve.server.http.schema import ChatRequest, CompletionRequest, SamplingFields

DEFAULT_COMPLETION_TOKENS = 16
_SHARED = SAMPLING_FIELDS & SamplingFields.model_fields.keys()


def completion_sampling(body: CompletionRequest) -> SamplingParams:
    """Raises InvalidRequest naming a field of the wrong kind."""
    max_tokens = DEFAULT_COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
    return sampling_from_json(_shared(body) | {"max_tokens": max_tokens, "logprobs": body.logprobs})


def chat_sampling(body: ChatRequest) -> SamplingParams:
    """Raises InvalidRequest for fields that contradict each other."""
    max_tokens = body.max_completion_tokens
    if max_tokens is None:
        max_tokens = body.max_tokens
    elif body.max_tokens not in (None, max_tokens):
        raise HttpRefusal(
            400,
            "invalid_value",
            "max_tokens",
            "and max_completion_tokens mean the same: send one of them",
        )
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs", "needs logprobs: set it to true")
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return sampling_from_json(_shared(body) | {"max_tokens": max_tokens, "logprobs": logprobs})


def _shared(body: SamplingFields) -> dict[str, Any]:
    return {name: getattr(body, name) for name in _SHARED}
