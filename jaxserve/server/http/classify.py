"""POST /v1/classify: the labels of each text, by a model that was trained to classify."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.server.http.embeddings import encode_input, vector_of
from jaxserve.server.http.replies import Classifications
from jaxserve.server.http.schema import ClassifyRequest
from jaxserve.server.http.service import HttpService
from jaxserve.server.ranked_labels import checked_top_k, ranked_labels


async def classify(service: HttpService, request: Request) -> Response:
    body = await service.read(request, ClassifyRequest)
    serving = service.accepting(body)
    serving.require_classes()
    top_k = checked_top_k(body.top_k, serving.card.num_classes)
    texts, outputs = await encode_input(service, request, serving, body)
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
