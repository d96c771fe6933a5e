"""POST /v1/chat/completions: the assistant's next message."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from jaxserve.errors import InvalidRequest
from jaxserve.server.grammars import grammar_of
from jaxserve.server.http.answers import Questions, answer, check_stream_options
from jaxserve.server.http.chat_form import ChatForm
from jaxserve.server.http.response_format import constraint_names, with_constraint
from jaxserve.server.http.sampling import chat_sampling
from jaxserve.server.http.schema import ChatRequest
from jaxserve.server.http.service import HttpService, adapter_of, in_client_words
from jaxserve.server.http.tools import tool_use
from jaxserve.server.http.turns import encode_messages
from jaxserve.server.prompt_limits import check_cache_salt
from models.token_bytes import TokenBytes


async def chat(service: HttpService, request: Request) -> Response:
    body = await service.read(request, ChatRequest)
    serving = service.accepting(body)
    serving.require_generation()
    try:
        check_stream_options(body)
        check_cache_salt("cache_salt", body.cache_salt or "")
        tools = await tool_use(body, service.tool_call_parser, serving)
        sampling = with_constraint(chat_sampling(body), body, tools)
        sampling.validate(vocab_size=serving.limits.vocab_size)
        grammar = await grammar_of(sampling.constraint, serving)
        described = None if tools is None else tools.described
        token_ids = await encode_messages(body.messages, serving, service, described)
        request_id = request.state.request_id
        adapter = adapter_of(body, serving)
        questions = Questions.of(body, [token_ids], sampling, request_id, grammar, adapter)
        form = ChatForm(
            id=f"chatcmpl-{request_id}",
            model=adapter or serving.card.name,
            weights=serving.weights_name(),
            num_choices=questions.num_choices,
            tells_token_ids=bool(body.return_token_ids),
            token_bytes=TokenBytes(serving.tokenizer) if body.logprobs else None,
            make_parser=None if tools is None else tools.format.make_parser,
        )
        return await answer(service, request, serving, questions, body, form)
    except InvalidRequest as error:
        raise in_client_words(error, _names(body)) from error


def _names(body: ChatRequest) -> dict[str, str]:
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return {
        "prompt": "messages",
        "prompt_token_ids": "messages",
        "logprobs": "top_logprobs",
        "max_tokens": limit,
        "request_id": "x-request-id",
        **constraint_names(body),
    }
