"""Errors of ours -> gRPC statuses, in one place.

What the client reads is the message of a JaxserveError, which is written for
it, or a constant text with the request's id; never another exception's text.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NoReturn

import grpc
import grpc.aio

from jaxserve.engine.failure_log import log_failure
from jaxserve.errors import (
    Forbidden,
    InvalidRequest,
    NoRoomForAdapter,
    NotAccepting,
    NotFound,
    NotSupported,
    QueueFull,
    StreamTooSlow,
    Unauthenticated,
)
from jaxserve.server.metadata import FIELD_KEY, RETRY_KEY

Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)


async def end_with_status(context: Context, error: Exception, request_id: str = "-") -> NoReturn:
    """Ends the call with the status that this error stands for."""
    if isinstance(error, InvalidRequest):
        field = ((FIELD_KEY, error.field),)
        await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error), field)
    if isinstance(error, QueueFull):
        retry = ((RETRY_KEY, str(math.ceil(1000 * error.retry_after_s))),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error), retry)
    if isinstance(error, StreamTooSlow):
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, str(error))
    if isinstance(error, NotAccepting):
        await context.abort(grpc.StatusCode.UNAVAILABLE, str(error))
    if isinstance(error, NotSupported):
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, str(error))
    if isinstance(error, NoRoomForAdapter):
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
    if isinstance(error, NotFound):
        await context.abort(grpc.StatusCode.NOT_FOUND, str(error))
    if isinstance(error, Unauthenticated):
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))
    if isinstance(error, Forbidden):
        await context.abort(grpc.StatusCode.PERMISSION_DENIED, str(error))
    if isinstance(error, grpc.aio.AbortError | grpc.aio.UsageError):
        raise error  # It has a status already, or the peer is gone.
    log_failure(_log, f"request {request_id} failed", error)
    await abort_internal(context, request_id)


async def abort_internal(context: Context, request_id: str) -> NoReturn:
    await context.abort(
        grpc.StatusCode.INTERNAL, f"the server failed on this request (request id {request_id})"
    )


async def abort_late(context: Context) -> NoReturn:
    await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed")
