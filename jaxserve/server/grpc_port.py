"""GrpcPort: the gRPC server, and the one after it when it ends by itself.

grpcio (1.85 and others) ends its asyncio server when any client sends a method's name that is not
UTF-8: an exception leaves the loop that accepts calls. Calls that run go on, but nobody listens any
more. So this looks whether somebody does, and takes the port anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable

import grpc.aio

from jaxserve.errors import ConfigError
from jaxserve.server.port_end import end_port

_log = logging.getLogger(__name__)

POLL_S = 0.5
WILDCARDS = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104  not bound here
"""Where a host that means all interfaces is found by this process."""


class GrpcPort:
    """
    Args:
        host: that the server listens on.
        make: a server that listens on a port once it is started, and that port. 0: any. Raises
            ConfigError when the port cannot be had, as the constructor does.
    """

    def __init__(
        self, host: str, port: int, make: Callable[[int], tuple[grpc.aio.Server, int]]
    ) -> None:
        self._host = WILDCARDS.get(host, host)
        self._make = make
        server, self.port = make(port)
        self._servers = [server]
        """The last one listens; those before it have calls that run."""
        self._stopping = False
        self.num_restarts = 0

    async def start(self) -> None:
        await self._servers[-1].start()

    async def watch(self) -> None:
        """Takes the port anew when nobody listens. Runs until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            if not self._stopping and await self._is_refused():
                await self._restart()

    async def stop(self, grace_s: float | None = None) -> None:
        """Takes no more calls, and ends those that run: their clients see UNAVAILABLE. What was
        written has `grace_s` to be read. Can be called twice."""
        self._stopping = True
        await end_port(self.port, grace_s or 0.0)
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))

    async def _is_refused(self) -> bool:
        try:
            _, writer = await asyncio.open_connection(self._host, self.port)
        except ConnectionRefusedError:
            return True
        except OSError:  # No descriptor is left, say: that tells nothing of the port.
            return False
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        return False

    async def _restart(self) -> None:
        try:
            server, _ = self._make(self.port)
        except ConfigError as error:
            _log.error("the gRPC server ended by itself; its port cannot be had: %s", error)
            return
        self._servers.append(server)
        await server.start()
        self.num_restarts += 1
        _log.error(
            "the gRPC server ended by itself, most likely by a method's name that is not "
            "UTF-8; another one has its port"
        )
