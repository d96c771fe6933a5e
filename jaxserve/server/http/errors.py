"""Errors of ours -> HTTP replies of OpenAI's shape, in one place.

What the client reads is the message of a JaxserveError, which is written for
it, or a constant text with the request's id; never another exception's text.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from jaxserve.engine.failure_log import log_failure
from jaxserve.errors import (
    EngineLost,
    Forbidden,
    InvalidRequest,
    JaxserveError,
    NoRoomForAdapter,
    NotAccepting,
    NotFound,
    NotSupported,
    OverLimit,
    QueueFull,
    StreamTooSlow,
    Unauthenticated,
)
from jaxserve.server.metadata import REQUEST_ID_KEY

RETRY_AFTER_S = 1
CLIENT_GONE = 499
"""Nobody reads this one."""

_log = logging.getLogger(__name__)


class HttpRefusal(InvalidRequest):
    """A refusal with a status or code of its own; `field` may be a header or `body`."""

    def __init__(self, status: int, code: str, field: str, message: str) -> None:
        super().__init__(field, message)
        self.status = status
        self.code = code


class AnswerCancelled(JaxserveError):
    """The request was ended before its answer was whole: by Abort, or since the server stops."""


class EngineFailure(JaxserveError):
    """The engine failed on the request."""


@dataclass(frozen=True, slots=True)
class ErrorReply:
    """What a client reads of an error."""

    status: int
    kind: str
    code: str
    message: str
    param: str | None = None
    retry_after_s: float = RETRY_AFTER_S

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self, request_id: str) -> Response:
        headers = {REQUEST_ID_KEY: request_id}
        if self.status in (429, 503):
            headers["retry-after"] = str(math.ceil(self.retry_after_s))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return JSONResponse(self.body, self.status, headers)


def reply_to(error: Exception, request_id: str) -> ErrorReply:
    """What to tell the client; a defect of ours is logged."""
    message = str(error)
    if isinstance(error, HttpRefusal):
        return ErrorReply(error.status, "invalid_request_error", error.code, message, error.field)
    if isinstance(error, InvalidRequest):
        return ErrorReply(400, "invalid_request_error", "invalid_value", message, error.field)
    if isinstance(error, NotSupported):
        return ErrorReply(400, "invalid_request_error", "unsupported_model", message, "model")
    if isinstance(error, NotFound):
        return ErrorReply(404, "invalid_request_error", "model_not_found", message, "model")
    if isinstance(error, NoRoomForAdapter):
        return ErrorReply(409, "invalid_request_error", "no_room_for_adapter", message)
    if isinstance(error, QueueFull):
        code = "rate_limit_exceeded" if isinstance(error, OverLimit) else "queue_full"
        wait_s = error.retry_after_s
        return ErrorReply(429, "rate_limit_error", code, message, retry_after_s=wait_s)
    if isinstance(error, Unauthenticated):
        return ErrorReply(401, "invalid_request_error", "invalid_api_key", message)
    if isinstance(error, Forbidden):
        return ErrorReply(403, "invalid_request_error", "forbidden", message)
    if isinstance(error, StreamTooSlow):
        return ErrorReply(429, "rate_limit_error", "stream_too_slow", message)
    if isinstance(error, EngineLost):
        return ErrorReply(503, "server_error", "engine_lost", message)
    if isinstance(error, NotAccepting):
        return ErrorReply(503, "server_error", "not_accepting", message)
    if isinstance(error, AnswerCancelled):
        return ErrorReply(503, "server_error", "cancelled", message)
    if isinstance(error, HTTPException):
        return _reply_of_router(error)
    if isinstance(error, ClientDisconnect):
        return ErrorReply(CLIENT_GONE, "invalid_request_error", "disconnected", "")
    if not isinstance(error, EngineFailure):
        log_failure(_log, f"request {request_id} failed", error)
    message = f"the server failed on this request (request id {request_id})"
    return ErrorReply(500, "server_error", "internal_error", message)


def _reply_of_router(error: HTTPException) -> ErrorReply:
    if error.status_code == 405:
        message = "the path is right, but not for this method: see /openapi.json"
        return ErrorReply(405, "invalid_request_error", "method_not_allowed", message)
    message = "there is nothing at this path: see /openapi.json"
    return ErrorReply(error.status_code, "invalid_request_error", "not_found", message)
