"""BoundedConnection: uvicorn's HTTP/1.1 connection, with limits on what a slow client can hold."""

from __future__ import annotations

import asyncio
import socket

from uvicorn import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

KEEP_ALIVE_S = 60
"""A connection may stay idle for this long after a reply."""


class BoundedConnection(H11Protocol):
    """Of one client. A request's body has a time limit of its own, in `read_body`."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        *,
        head_timeout_s: float,
        stall_timeout_s: float,
    ) -> None:
        """
        Args:
            head_timeout_s: for a request's head, from when the connection opens or the head's
                first byte comes.
            stall_timeout_s: a client that takes nothing of a reply for so long, or is gone
                without a word, is cut off.
        """
        super().__init__(config, server_state, {})
        self._head_timeout_s = head_timeout_s
        self._stall_timeout_s = stall_timeout_s
        self._head_timer: asyncio.TimerHandle | None = None

    # uvicorn narrows asyncio's type of a transport.
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        end = transport.get_extra_info("socket")
        # The kernel drops a peer that does not take what is sent, or is not there any more.
        stall_s = self._stall_timeout_s
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * stall_s))
        end.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, int(stall_s / 2)))
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, int(stall_s / 6)))
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._head_timer is None and self._is_idle():
            self._await_head()
        super().data_received(data)

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._stop_head_timer()

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
