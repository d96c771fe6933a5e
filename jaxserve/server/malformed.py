"""Bytes that are no message of the method -> INVALID_ARGUMENT.

gRPC itself would answer UNKNOWN with the parser's exception in the text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from jaxserve.errors import InvalidRequest
from jaxserve.server.status import Context, end_with_status

Handler = Callable[[Any, Context], Awaitable[Any]]


class RefuseMalformed(grpc.aio.ServerInterceptor):
    """For handlers that are coroutines, which all unary ones of ours are."""

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        handler = await continuation(details)
        if handler is None or handler.request_streaming:
            return handler
        parse, write = _or_malformed(handler.request_deserializer), handler.response_serializer
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(
                _refusing(handler.unary_stream), parse, write
            )
        return grpc.unary_unary_rpc_method_handler(_refusing(handler.unary_unary), parse, write)


def _or_malformed(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def parse_or_malformed(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError:
            return _MALFORMED

    return parse_or_malformed


def _refusing(handler: Handler) -> Handler:
    async def handle(request: Any, context: Context) -> Any:
        if request is _MALFORMED:
            error = InvalidRequest("request", "is not a message of this method, or not UTF-8")
            await end_with_status(context, error)
        return await handler(request, context)

    return handle


_MALFORMED = object()
