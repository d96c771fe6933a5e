"""POST /v1/classify: the labels of each text, by a model that was trained to classify."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.engine.request import GenerationRequest
from jaxserve.server.http.disconnect import unless_disconnected
from jaxserve.server.http.embeddings import encode_prompts, vector_of
from jaxserve.server.http.prompts import as_prompts
from jaxserve.server.http.replies import Classifications
from jaxserve.server.http.schema import ClassifyRequest
from jaxserve.server.http.service import HttpService
from jaxserve.server.prompt_limits import at_most
from jaxserve.server.ranked_labels import checked_top_k, ranked_labels


async def classify(service: HttpService, request: Request) -> Response:
    body = await service.read(request, ClassifyRequest)
    serving = service.accepting(body)
    serving.require_classes()
    top_k = checked_top_k(body.top_k, serving.card.num_classes)
    prompts = as_prompts("input", body.input)
    at_most("input", len(prompts), serving.limits.max_texts, "texts")
    texts = await encode_prompts(service, serving, prompts, truncate=bool(body.truncate))
    requests = [
        service.claim(
            request, GenerationRequest(f"{request.state.request_id}-{index}", text.token_ids)
        )
        for index, text in enumerate(texts)
    ]
    outputs = await unless_disconnected(
        request.receive, serving.async_engine.complete_all(requests)
    )
    num_tokens = sum(len(text.token_ids) for text in texts)
    reply: Classifications = {
        "object": "list",
        "model": serving.card.name,
        "data": [
            {
                "object": "classification",
                "index": index,
                "labels": [
                    {"id": one.label_id, "text": one.text, "score": one.score}
                    for one in ranked_labels(vector_of(output), serving, top_k)
                ],
            }
            for index, output in enumerate(outputs)
        ],
        "usage": {"prompt_tokens": num_tokens, "completion_tokens": 0, "total_tokens": num_tokens},
    }
    return JSONResponse(reply)
