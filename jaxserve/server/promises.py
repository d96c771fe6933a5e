"""Promises: requests that were taken over gRPC, until their last message and status have left."""

from __future__ import annotations

import asyncio

from jaxserve.server.status import Context


class Promises:
    """All methods run on one event loop."""

    def __init__(self) -> None:
        self.num_open = 0
        self._none_open = asyncio.Event()
        self._none_open.set()

    def make(self, context: Context) -> None:
        """This call's request is taken; the promise is open until the call has ended, whichever
        way."""
        self.num_open += 1
        self._none_open.clear()
        # The stubs' type of a callback is a class, not a protocol.
        context.add_done_callback(self._end)  # type: ignore[arg-type]

    async def wait(self, timeout_s: float) -> bool:
        """Until none is open. False if some still are after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_open.wait()
        except TimeoutError:
            return False
        return True

    def _end(self, _: object) -> None:
        self.num_open -= 1
        if not self.num_open:
            self._none_open.set()
