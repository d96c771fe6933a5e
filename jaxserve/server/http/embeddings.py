"""POST /v1/embeddings: one vector of each text, by an encoder."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.engine.encoder.texts import EncodedText, tokenize_texts
from jaxserve.engine.request import FinishReason, GenerationRequest, RequestOutput
from jaxserve.errors import InvalidRequest
from jaxserve.server.http.disconnect import unless_disconnected
from jaxserve.server.http.errors import AnswerCancelled, EngineFailure
from jaxserve.server.http.prompts import Prompt, as_prompts, check_vocabulary
from jaxserve.server.http.replies import Embedding, Embeddings
from jaxserve.server.http.schema import ClassifyRequest, EmbeddingRequest
from jaxserve.server.http.service import HttpService
from jaxserve.server.prompt_limits import at_most
from jaxserve.server.state import Serving
from models.tokenizer import cut


async def embed(service: HttpService, request: Request) -> Response:
    body = await service.read(request, EmbeddingRequest)
    serving = service.accepting(body)
    serving.require_embeddings()
    texts, outputs = await encode_input(service, request, serving, body)
    num_tokens = sum(len(text.token_ids) for text in texts)
    as_text = body.encoding_format == "base64"
    reply: Embeddings = {
        "object": "list",
        "model": serving.card.name,
        "data": [
            _entry(index, output, serving.card.embedding_size, as_text)
            for index, output in enumerate(outputs)
        ],
        "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
    }
    return JSONResponse(reply)


async def encode_input(
    service: HttpService,
    request: Request,
    serving: Serving,
    body: EmbeddingRequest | ClassifyRequest,
) -> tuple[list[EncodedText], list[RequestOutput]]:
    """Runs all texts of a request through the encoder. Raises InvalidRequest naming the input."""
    prompts = as_prompts("input", body.input)
    at_most("input", len(prompts), serving.limits.max_texts, "texts")
    texts = await _encode_prompts(service, serving, prompts, truncate=bool(body.truncate))
    requests = [
        service.claim(
            request, GenerationRequest(f"{request.state.request_id}-{index}", text.token_ids)
        )
        for index, text in enumerate(texts)
    ]
    outputs = await unless_disconnected(
        request.receive, serving.async_engine.complete_all(requests)
    )
    return texts, list(outputs)


async def _encode_prompts(
    service: HttpService, serving: Serving, prompts: Sequence[Prompt], *, truncate: bool
) -> list[EncodedText]:
    """The token ids of texts, or as they were given. Raises InvalidRequest naming the input."""
    if isinstance(prompts[0], str):
        texts = tuple(text for text in prompts if isinstance(text, str))
        for index, text in enumerate(texts):
            serving.limits.check_text(f"input[{index}]", text)
        tokenize = partial(
            tokenize_texts,
            serving.tokenizer,
            texts,
            max_tokens=serving.card.max_model_len,
            truncate=truncate,
        )
        try:
            return await asyncio.get_running_loop().run_in_executor(service.workers, tokenize)
        except InvalidRequest as error:
            message = str(error).removeprefix(f"{error.field}: ")
            raise InvalidRequest(error.field.replace("texts", "input"), message) from error
    return [
        _as_given(index, ids, serving, truncate=truncate)
        for index, ids in enumerate(prompts)
        if not isinstance(ids, str)
    ]


def _as_given(
    index: int, token_ids: Sequence[int], serving: Serving, *, truncate: bool
) -> EncodedText:
    field, max_tokens = f"input[{index}]", serving.card.max_model_len
    if not token_ids:
        raise InvalidRequest(field, "must not be empty")
    check_vocabulary(field, token_ids, serving)
    if not truncate:
        at_most(field, len(token_ids), max_tokens, "token ids")
    return EncodedText(cut(token_ids, max_tokens), is_cut=len(token_ids) > max_tokens)


def _entry(index: int, output: RequestOutput, size: int | None, as_text: bool) -> Embedding:
    vector = vector_of(output)[:size]
    if as_text:
        encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode()
        return {"object": "embedding", "index": index, "embedding": encoded}
    return {"object": "embedding", "index": index, "embedding": vector.tolist()}


def vector_of(output: RequestOutput) -> npt.NDArray[np.float32]:
    """What the step made of a text. Raises EngineFailure, AnswerCancelled: nothing."""
    if output.finish_reason is FinishReason.ERROR:
        raise EngineFailure
    if output.embedding is None:
        raise AnswerCancelled("the server stopped before all texts were embedded: use another one")
    return output.embedding
