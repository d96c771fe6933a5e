"""Refusals over gRPC that wait for no message: of a full queue, and of a server that starts or
drains."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio

from jaxserve.errors import NotAccepting, QueueFull
from jaxserve.server.state import ServerState
from jaxserve.server.status import Context, end_with_status

WORKING_METHODS = frozenset(
    f"/jaxserve.v1.Inference/{name}" for name in ("Generate", "Embed", "Classify")
)
"""Those that ask the engine for work."""


class RefuseEarly(grpc.aio.ServerInterceptor):
    """Comes after the one that looks at keys: whether there is room is nobody else's business."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        if details.method not in WORKING_METHODS:
            return await continuation(details)
        try:
            self._state.require_accepting()
        except (NotAccepting, QueueFull) as error:
            self._state.note_refusal(error)
            return _refusing(error)
        return await continuation(details)


def _refusing(error: NotAccepting | QueueFull) -> Any:
    """Of the kind that reads its messages itself; this one reads none, so that the status leaves
    before the request's message has been taken in."""

    async def refuse(_: Any, context: Context) -> None:
        await end_with_status(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)
