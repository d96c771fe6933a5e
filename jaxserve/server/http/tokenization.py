"""POST /tokenize and /detokenize: the token ids that the other endpoints would use, and back."""

from __future__ import annotations

import asyncio
from functools import partial

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from jaxserve.errors import InvalidRequest
from jaxserve.server.http.prompts import check_vocabulary, run_tokenizer
from jaxserve.server.http.replies import Text, Tokens
from jaxserve.server.http.schema import DetokenizeRequest, TokenizeRequest
from jaxserve.server.http.service import HttpService
from jaxserve.server.http.turns import encode_messages


async def tokenize(service: HttpService, request: Request) -> Response:
    body = await service.read(request, TokenizeRequest)
    serving = service.serving(body)
    prompt, messages = body.prompt, body.messages
    if (prompt is None) == (messages is None):
        raise InvalidRequest("prompt", "or messages is needed: one of the two")
    if messages is not None:
        if body.add_special_tokens is not None:
            raise InvalidRequest("add_special_tokens", "is for a prompt: the template adds its own")
        token_ids = await encode_messages(messages, serving, service)
    elif prompt is not None:
        serving.limits.check_text("prompt", prompt)
        encode = partial(
            serving.tokenizer.encode,
            prompt,
            add_special_tokens=body.add_special_tokens is not False,
        )
        token_ids = (await run_tokenizer("prompt", lambda: [encode()], service.workers))[0]
    reply: Tokens = {
        "tokens": token_ids,
        "count": len(token_ids),
        "max_model_len": serving.card.max_model_len,
    }
    return JSONResponse(reply)


async def detokenize(service: HttpService, request: Request) -> Response:
    body = await service.read(request, DetokenizeRequest)
    serving = service.serving(body)
    if body.tokens:
        serving.limits.check_token_ids("tokens", body.tokens)
    check_vocabulary("tokens", body.tokens, serving)
    decode = partial(serving.tokenizer.decode, body.tokens, skip_special_tokens=False)
    text = await asyncio.get_running_loop().run_in_executor(service.workers, decode)
    reply: Text = {"prompt": text}
    return JSONResponse(reply)
