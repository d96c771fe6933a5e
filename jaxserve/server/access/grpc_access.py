"""RequireAccess: no gRPC method is reached by a caller that its rule does not let in."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
import grpc.aio

from jaxserve.errors import Forbidden, JaxserveError, Unauthenticated
from jaxserve.server.access.key_ring import AUTHORIZATION_KEY, KeyRing
from jaxserve.server.access.policy import GRPC_ACCESS
from jaxserve.server.access.tenant import Tenant
from jaxserve.server.state import ServerState
from jaxserve.server.status import Context, end_with_status

Metadata = Iterable[tuple[str, str | bytes]]


class RequireAccess(grpc.aio.ServerInterceptor):
    """Looks at the method's name and the metadata alone, before a message is parsed."""

    def __init__(self, ring: KeyRing, state: ServerState) -> None:
        self._ring = ring
        self._state = state

    async def intercept_service(self, continuation: Any, details: Any) -> Any:
        try:
            authorize(self._ring, details.method, details.invocation_metadata)
        except (Unauthenticated, Forbidden) as error:
            self._state.note_refusal(error)
            return _refusing(await continuation(details), error)
        return await continuation(details)


def authorize(ring: KeyRing, method: str, metadata: Metadata | None) -> Tenant:
    """Who calls. Raises Unauthenticated or Forbidden."""
    return ring.authorize(GRPC_ACCESS.get(method), _authorization(metadata))


def _authorization(metadata: Metadata | None) -> str | None:
    for key, value in metadata or ():
        if key == AUTHORIZATION_KEY:
            return value.decode("latin-1") if isinstance(value, bytes) else value
    return None


def _refusing(handler: Any, error: JaxserveError) -> Any:
    """A handler of the same kind, so that a refusal waits for no message that never comes."""

    async def refuse(_: Any, context: Context) -> None:
        await end_with_status(context, error)

    if handler is not None and handler.request_streaming and handler.response_streaming:
        return grpc.stream_stream_rpc_method_handler(refuse)
    if handler is not None and handler.request_streaming:
        return grpc.stream_unary_rpc_method_handler(refuse)
    if handler is not None and handler.response_streaming:
        return grpc.unary_stream_rpc_method_handler(refuse)
    return grpc.unary_unary_rpc_method_handler(refuse)


def check_rules(services: Iterable[Any]) -> None:
    """Raises LookupError unless every method of these service descriptors has a rule."""
    methods = {
        f"/{service.full_name}/{one.name}" for service in services for one in service.methods
    }
    if without := sorted(methods - GRPC_ACCESS.keys()):
        raise LookupError(f"GRPC_ACCESS has no rule for {', '.join(without)}")
