"""The application: the endpoints' routes, and what every request must be."""

from __future__ import annotations

import logging
from functools import partial

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxserve.engine.failure_log import log_failure
from jaxserve.errors import (
    Forbidden,
    InvalidRequest,
    JaxserveError,
    NotAccepting,
    QueueFull,
    Unauthenticated,
)
from jaxserve.server.access.policy import Access
from jaxserve.server.http.endpoints import ENDPOINTS
from jaxserve.server.http.errors import HttpRefusal, reply_to
from jaxserve.server.http.openapi import openapi
from jaxserve.server.http.service import HttpService, request_id_of
from jaxserve.server.http.web_page import page_routes

_log = logging.getLogger(__name__)


def make_app(
    service: HttpService,
    *,
    max_head_bytes: int,
    hosts: frozenset[str] | None,
    with_page: bool = True,
) -> Gate:
    """The ASGI application. It sends no CORS headers, so pages of other sites cannot read it.

    Args:
        max_head_bytes: most bytes of a request's path and headers.
        hosts: names that the Host header may have; None allows any.
        with_page: the web page is there.
    """
    routes = [
        Route(
            endpoint.path.replace("{model}", "{model:path}"),
            service.answering(
                partial(endpoint.handler, service),
                access=endpoint.access,
                counts_refusals=endpoint.asks_engine,
            ),
            methods=[endpoint.method],
        )
        for endpoint in ENDPOINTS
    ]
    described = service.answering(partial(openapi, service), access=Access.ANY_KEY)
    routes.append(Route("/openapi.json", described, methods=["GET"]))
    page = page_routes() if with_page else []
    app = Starlette(routes=[*routes, *page], exception_handlers={404: _nowhere, 405: _nowhere})
    app.router.redirect_slashes = False
    open_paths = _OPEN_PATHS | {route.path for route in page}
    return Gate(app, service, max_head_bytes, hosts, open_paths)


def _nowhere(_: Request, error: Exception) -> Response:
    return reply_to(error, "-").response("-")


_OPEN_PATHS = frozenset(one.path for one in ENDPOINTS if one.access is Access.OPEN)
_WORK = {(one.method, one.path): one.access for one in ENDPOINTS if one.asks_engine}
"""Who may ask the engine for work, by method and path."""


class Gate:
    """Refuses requests by their head alone. Without a key nothing but the open paths is reached,
    whatever the router knows.

    A page of another site cannot read replies, but it can make its own name lead to this
    machine. Its requests then carry that name in Host.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: HttpService,
        max_head_bytes: int,
        hosts: frozenset[str] | None,
        open_paths: frozenset[str],
    ) -> None:
        self._app = app
        self._open_paths = open_paths
        self._service = service
        self._max_head_bytes = max_head_bytes
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self.refuse(scope)
        if refused is not None:
            await refused(scope, receive, send)
            return
        try:
            await self._app(scope, receive, send)
        except Exception as error:
            # uvicorn ends the connection. It would log the exception's text, so it logs nothing.
            log_failure(_log, "an HTTP request failed outside its handler", error)
            raise

    def refuse(self, scope: Scope) -> Response | None:
        """The reply to a request that its head alone is enough to refuse, and counts it."""
        refusal: JaxserveError | None = self._refusal(scope)
        if refusal is None and scope["path"] not in self._open_paths:
            try:
                self._check_key_and_room(scope)
            except (Unauthenticated, Forbidden, NotAccepting, QueueFull) as error:
                self._service.state.note_refusal(error)
                refusal = error
        if refusal is None:
            return None
        request_id = _id_for_refusal(scope)
        return reply_to(refusal, request_id).response(request_id)

    def _check_key_and_room(self, scope: Scope) -> None:
        """Before the body is read and a route is looked for: what is refused must cost little."""
        work = _WORK.get((scope["method"], scope["path"]))
        self._service.tenant(scope, Access.ANY_KEY if work is None else work)
        if work is not None:
            self._service.state.require_accepting()

    def _refusal(self, scope: Scope) -> HttpRefusal | None:
        hosts = [value for name, value in scope["headers"] if name == b"host"]
        if len(hosts) > 1 or (not hosts and scope["http_version"] == "1.1"):
            # RFC 9112, 3.2: a proxy may have read another one than we would.
            return HttpRefusal(400, "invalid_host", "host", "must be there, and once")
        codings = [value for name, value in scope["headers"] if name == b"transfer-encoding"]
        if codings and [one.lower() for one in codings] != [b"chunked"]:
            return HttpRefusal(501, "not_supported", "transfer-encoding", "only chunked is read")
        num_bytes = len(scope["raw_path"]) + len(scope["query_string"])
        num_bytes += sum(len(name) + len(value) for name, value in scope["headers"])
        if num_bytes > self._max_head_bytes:
            limit = self._max_head_bytes
            return HttpRefusal(
                431, "headers_too_large", "headers", f"at most {limit} bytes are allowed"
            )
        if self._hosts is not None:
            host = hosts[0].decode("latin-1") if hosts else ""
            if host_name(host) not in self._hosts:
                return HttpRefusal(
                    403, "foreign_host", "host", "is not a name of this server (--allowed-host)"
                )
        return None


def _id_for_refusal(scope: Scope) -> str:
    try:
        return request_id_of(Request(scope))
    except InvalidRequest:
        return "-"


def host_name(host: str) -> str:
    """The name in a Host header, in lower case, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()
