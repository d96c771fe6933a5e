"""HttpServer: listens on a port and serves the application, on the running event loop."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterable
from concurrent.futures import Executor
from email.utils import formatdate

import uvicorn
from uvicorn.server import ServerState as Connections

from jaxserve.server.access.door import Door
from jaxserve.server.config import LOOPBACK_HOSTS, ServerConfig
from jaxserve.server.http.app import make_app
from jaxserve.server.http.connection import KEEP_ALIVE_S, BoundedConnection, bound_stalls
from jaxserve.server.http.service import HttpService
from jaxserve.server.ports import listen_error
from jaxserve.server.state import ServerState
from jaxserve.server.tls import TlsKeeper

BACKLOG = 1024
FLUSH_POLL_S = 0.02


class HttpServer:
    """Listens from `start` to `stop`.

    uvicorn's own Server is not used: it takes the process's signals.
    """

    def __init__(
        self,
        config: ServerConfig,
        state: ServerState,
        workers: Executor,
        door: Door,
        tls: TlsKeeper | None = None,
    ) -> None:
        """Takes the port. Raises ConfigError when it cannot be had."""
        service = HttpService(
            state,
            workers,
            config.max_message_bytes,
            config.http_body_timeout_s,
            door,
            config.pacing,
            config.tool_call_parser,
            config.lora_dir,
        )
        self._tls = tls
        self._gate = make_app(
            service,
            max_head_bytes=config.max_metadata_bytes,
            hosts=_allowed_hosts(config),
            with_page=config.web_page,
        )
        self._config = config
        self._uvicorn = uvicorn.Config(
            self._gate,
            http=BoundedConnection,
            ws="none",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            limit_concurrency=config.max_concurrent_calls,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
        self._uvicorn.load()
        self._connections = Connections()
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            self._socket = socket.create_server((config.host, config.http_port), family=family)
        except OSError as error:
            raise listen_error("--http-port", config.host, config.http_port, error) from error
        bound_stalls(self._socket, config.http_stall_timeout_s)
        self.port: int = self._socket.getsockname()[1]
        self._server: asyncio.Server | None = None
        self._clock: asyncio.Task[None] | None = None

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        self._clock = asyncio.create_task(self._tell_date())
        self._server = await loop.create_server(
            self._connection,
            sock=self._socket,
            backlog=BACKLOG,
            ssl=None if self._tls is None else self._tls.context,
            ssl_handshake_timeout=None if self._tls is None else self._config.http_head_timeout_s,
        )

    async def stop(self, grace_s: float = 0.0) -> bool:
        """Takes no more connections; replies have `grace_s` to come to their end.

        False when some had to be cut short. Can be called twice.
        """
        if self._server is None:
            self._socket.close()
            return True
        self._server.close()
        if self._clock is not None:
            self._clock.cancel()
        for connection in tuple(self._connections.connections):
            connection.shutdown()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_s):
                while not self._all_handed_over():
                    await asyncio.sleep(FLUSH_POLL_S)
        is_whole = self._all_handed_over()
        await _cancelled(self._connections.tasks)
        for connection in tuple(self._connections.connections):
            connection.transport.abort()
        return is_whole

    def _all_handed_over(self) -> bool:
        """Whether the kernel has all of every reply: one that is over may lie in this process until
        its client takes it."""
        return not self._connections.tasks and not any(
            connection.transport.get_write_buffer_size()
            for connection in self._connections.connections
        )

    def _connection(self) -> BoundedConnection:
        return BoundedConnection(
            self._uvicorn,
            self._connections,
            refuse=self._gate.refuse,
            max_head_bytes=self._config.max_metadata_bytes,
            head_timeout_s=self._config.http_head_timeout_s,
        )

    async def _tell_date(self) -> None:
        while True:
            date = formatdate(usegmt=True).encode()
            self._connections.default_headers = [(b"date", date)]
            await asyncio.sleep(1.0)


def _allowed_hosts(config: ServerConfig) -> frozenset[str] | None:
    """Any name on an open interface, which has names that this process cannot know."""
    if config.host not in LOOPBACK_HOSTS and not config.allowed_hosts:
        return None
    names = (*LOOPBACK_HOSTS, config.host, *config.allowed_hosts)
    return frozenset(name.lower() for name in names)


async def _cancelled(tasks: Iterable[asyncio.Task[None]]) -> None:
    for task in tuple(tasks):
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
