"""The endpoints: one table for the router and for /openapi.json."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.server.access.policy import Access
from jaxserve.server.http import (
    adapters,
    chat,
    classify,
    completions,
    embeddings,
    information,
    replies,
    tokenization,
)
from jaxserve.server.http.schema import (
    Body,
    ChatRequest,
    ClassifyRequest,
    CompletionRequest,
    DetokenizeRequest,
    EmbeddingRequest,
    LoadAdapterRequest,
    TokenizeRequest,
    UnloadAdapterRequest,
)
from jaxserve.server.http.service import HttpService

TEXT = "text/plain"


@dataclass(frozen=True, slots=True)
class Endpoint:
    method: str
    path: str
    summary: str
    handler: Callable[[HttpService, Request], Awaitable[Response]]
    reply: Any
    """Its type, or `TEXT`."""
    body: type[Body] | None = None
    chunk: Any = None
    """Of a stream, where there is one."""
    access: Access = field(kw_only=True)
    """Who may ask, on a server with API keys."""
    asks_engine: bool = False
    """Its refusals are counted as those of requests for text or embeddings."""


ENDPOINTS = (
    Endpoint(
        "POST",
        "/v1/chat/completions",
        "The assistant's next message",
        chat.chat,
        replies.ChatCompletion,
        ChatRequest,
        replies.ChatChunk,
        access=Access.INFERENCE,
        asks_engine=True,
    ),
    Endpoint(
        "POST",
        "/v1/completions",
        "Texts that go on",
        completions.complete,
        replies.Completion,
        CompletionRequest,
        replies.Completion,
        access=Access.INFERENCE,
        asks_engine=True,
    ),
    Endpoint(
        "POST",
        "/v1/embeddings",
        "One vector of each text, by an encoder",
        embeddings.embed,
        replies.Embeddings,
        EmbeddingRequest,
        access=Access.INFERENCE,
        asks_engine=True,
    ),
    Endpoint(
        "POST",
        "/v1/classify",
        "Labels of each text, by a model that was trained to classify",
        classify.classify,
        replies.Classifications,
        ClassifyRequest,
        access=Access.INFERENCE,
        asks_engine=True,
    ),
    Endpoint(
        "GET",
        "/v1/models",
        "The model and its adapters",
        information.list_models,
        replies.Models,
        access=Access.ANY_KEY,
    ),
    Endpoint(
        "GET",
        "/v1/models/{model}",
        "The model",
        information.get_model,
        replies.Model,
        access=Access.ANY_KEY,
    ),
    Endpoint(
        "POST",
        "/v1/load_lora_adapter",
        "Load an adapter, for administrators",
        adapters.load,
        replies.LoadedAdapter,
        LoadAdapterRequest,
        access=Access.ADMIN,
    ),
    Endpoint(
        "POST",
        "/v1/unload_lora_adapter",
        "Unload an adapter, for administrators",
        adapters.unload,
        replies.UnloadedAdapter,
        UnloadAdapterRequest,
        access=Access.ADMIN,
    ),
    Endpoint(
        "POST",
        "/tokenize",
        "Token ids of a text or a chat",
        tokenization.tokenize,
        replies.Tokens,
        TokenizeRequest,
        access=Access.INFERENCE,
    ),
    Endpoint(
        "POST",
        "/detokenize",
        "The text of token ids",
        tokenization.detokenize,
        replies.Text,
        DetokenizeRequest,
        access=Access.INFERENCE,
    ),
    Endpoint(
        "GET",
        "/version",
        "The server's version",
        information.version,
        replies.Version,
        access=Access.ANY_KEY,
    ),
    Endpoint(
        "GET",
        "/v1/load",
        "How busy the server is",
        information.load,
        replies.LoadReport,
        access=Access.METRICS,
    ),
    Endpoint(
        "GET",
        "/health",
        "200 unless the engine is stuck",
        information.health,
        TEXT,
        access=Access.OPEN,
    ),
    Endpoint(
        "GET",
        "/health/ready",
        "200 if requests are served",
        information.ready,
        TEXT,
        access=Access.OPEN,
    ),
    Endpoint(
        "GET",
        "/metrics",
        "Figures for Prometheus",
        information.metrics,
        TEXT,
        access=Access.METRICS,
    ),
)
