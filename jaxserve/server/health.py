"""grpc.health.v1: SERVING means that a request sent now will be worked on."""

from __future__ import annotations

import asyncio

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from jaxserve.server.state import Phase, ServerState

SERVICES = ("", "jaxserve.v1.Inference", "jaxserve.v1.Control")
_SERVING = health_pb2.HealthCheckResponse.SERVING
_NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class HealthReporter:
    """Keeps the health service in step with the server's state."""

    def __init__(self, state: ServerState, *, poll_s: float = 1.0) -> None:
        self.servicer = health_aio.HealthServicer()
        self._state = state
        self._poll_s = poll_s
        self._reported: Phase | None = None

    async def refresh(self) -> None:
        """Tells the watchers when the state has changed."""
        phase = self._state.phase
        if phase is self._reported:
            return
        self._reported = phase
        for service in SERVICES:
            await self.servicer.set(service, _SERVING if phase is Phase.READY else _NOT_SERVING)

    async def watch(self) -> None:
        """Runs until cancelled: a stuck engine announces nothing, so look."""
        while True:
            await self.refresh()
            await asyncio.sleep(self._poll_s)
