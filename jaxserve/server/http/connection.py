"""BoundedConnection: uvicorn's HTTP/1.1 connection, with limits on what one client can hold."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import cast

import httptools
from starlette.responses import Response
from starlette.types import Scope
from uvicorn import Config
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

KEEP_ALIVE_S = 60
"""A connection may stay idle for this long after a reply."""
MAX_PIPELINED = 16
"""Requests of one connection that wait for the replies before them. Few clients send any so."""


def bound_stalls(listener: socket.socket, stall_timeout_s: float) -> None:
    """Connections of this socket end when their client takes nothing of a reply for so long, or is
    gone without a word. They have it of the listening socket, so that it costs them no calls."""
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * stall_timeout_s))
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(stall_timeout_s / 2)))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(stall_timeout_s / 6)))


class _Refused(Exception):
    """Ends the connection, with 400 if nothing was replied."""


class BoundedConnection(HttpToolsProtocol):
    """Of one client. A request's body has a time limit of its own, in `read_body`.

    The parser (llhttp) keeps a head until it is whole, however long it is, so that it is counted
    here.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        *,
        refuse: Callable[[Scope], Response | None],
        max_head_bytes: int,
        head_timeout_s: float,
    ) -> None:
        """
        Args:
            refuse: the reply to a request that its head alone is enough to refuse. It is written
                at once: a task of its own would cost more than all the rest of a refusal.
            max_head_bytes: most bytes of a head that has not come to its end, and of what follows
                a chunked body. A head that comes at once may be larger than that; the application
                refuses it.
            head_timeout_s: for a request's head, from when the connection opens or the head's
                first byte comes.
        """
        super().__init__(config, server_state, {})
        self._refuse = refuse
        self._max_head_bytes = max_head_bytes
        self._head_timeout_s = head_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_in_head = False
        self._num_open_bytes = 0
        """Of a head that has not come to its end, or of trailers."""

    # uvicorn narrows asyncio's type of a transport.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is None and self._is_idle():
            self._await_head()
        self._unset_keepalive_if_required()
        goes_on = self._is_in_head
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError:
            self.send_400_response("Invalid HTTP request received.")
            return
        if not (goes_on and self._is_in_head):
            return  # Where in `data` a head begins is not known; the next piece counts.
        self._num_open_bytes += len(data)
        if self._num_open_bytes > self._max_head_bytes:
            self.send_400_response("The request's head is too large.")

    def _parse(self, data: memoryview) -> None:
        """Of a request that asks for another protocol, too, the parser reads the head alone. It
        gets that head again without the question, which may be left unanswered."""
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self.parser.feed_data(self._head_without_upgrade())
            else:
                return

    def _head_without_upgrade(self) -> bytes:
        version = self.parser.get_http_version().encode()
        parts = [self.parser.get_method(), b" ", self.url, b" HTTP/", version, b"\r\n"]
        for name, value in self.headers:
            if name != b"upgrade":
                parts += (name, b": ", value, b"\r\n")
        return b"".join((*parts, b"\r\n"))

    def on_message_begin(self) -> None:
        if len(self.pipeline) >= MAX_PIPELINED:
            raise _Refused
        self._is_in_head = True
        self._num_open_bytes = 0
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._is_in_head:
            super().on_header(name, value)
            return
        # A trailer. uvicorn would add it to the head that the application has looked at.
        self._num_open_bytes += len(name) + len(value) + len(b": \r\n")
        if self._num_open_bytes > self._max_head_bytes:
            raise _Refused

    def on_headers_complete(self) -> None:
        self._is_in_head = False
        self._num_open_bytes = 0
        if self.parser.get_method() == b"CONNECT":
            raise _Refused
        if self.parser.should_upgrade():
            return
        super().on_headers_complete()
        self._stop_head_timer()

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        super().on_message_complete()
        if self._is_idle():
            # The rest of a body that nobody waited for is no head that begins.
            self._stop_head_timer()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        # Replies that a client does not take must wait, so that they are bounded.
        is_at_once = app is self.app and not self.flow.write_paused
        reply = self._refuse(cast(Scope, cycle.scope)) if is_at_once else None
        if reply is None:
            super()._start_asgi_task(cycle, app)
            return
        cycle.response_started = cycle.response_complete = True
        cycle.message_event.set()
        self.transport.write(self._bytes_of(reply, cycle))
        if not cycle.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _bytes_of(self, reply: Response, cycle: RequestResponseCycle) -> bytes:
        parts = [STATUS_LINE[reply.status_code]]
        for name, value in (*self.server_state.default_headers, *reply.raw_headers):
            parts += (name, b": ", value, b"\r\n")
        if not cycle.keep_alive:
            parts.append(b"connection: close\r\n")
        parts.append(b"\r\n")
        if cycle.scope["method"] != "HEAD":
            parts.append(bytes(reply.body))
        return b"".join(parts)

    def _is_idle(self) -> bool:
        # uvicorn has no cycle before the first request, whatever its annotation says.
        cycle: RequestResponseCycle | None = self.cycle
        return cycle is None or cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self._head_timeout_s, self._cut_off)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _cut_off(self) -> None:
        self._head_timer = None
        if self._is_idle():
            self.transport.abort()
