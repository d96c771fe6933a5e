"""What a server holds when nobody asks it anything."""

from __future__ import annotations

import asyncio
import gc
from dataclasses import dataclass

from tools.chaos.soaked_server import SoakedServer

MAX_LOOKS = 120
LOOK_PERIOD_S = 0.5
NUM_EQUAL_LOOKS = 5


@dataclass(frozen=True, slots=True)
class AtRest:
    num_fds: int
    num_tasks: int
    num_pages_held: int
    num_requests: int
    num_compiles: int


async def at_rest(server: SoakedServer) -> AtRest:
    """Waits until nothing runs and the connections are closed, for `MAX_LOOKS` looks at most.

    Not for a time, since the machine may stand still. Raises RuntimeError if the server tells
    nothing any more.
    """
    gc.collect()  # gRPC's channels are closed, but keep their sockets until then.
    calm: list[AtRest] = []
    for _ in range(MAX_LOOKS):
        try:
            now = await asyncio.to_thread(_look, server)
        except OSError:
            calm.clear()
            continue
        calm = [*calm, now] if not calm or calm[-1] == now else [now]
        if len(calm) >= NUM_EQUAL_LOOKS and now.num_requests == now.num_pages_held == 0:
            return now
        await asyncio.sleep(LOOK_PERIOD_S)
    if not calm:
        raise RuntimeError("the server gives no figures any more")
    return calm[-1]


def _look(server: SoakedServer) -> AtRest:
    figures, sample = server.metrics(), server.sample()
    assert sample is not None, "the server is gone"
    num_pages = figures["kv_cache_pages_total"]
    held = num_pages - figures["kv_cache_pages_free"] - figures["kv_cache_pages_cached"]
    return AtRest(
        num_fds=sample.num_fds,
        num_tasks=int(figures["event_loop_tasks"]),
        num_pages_held=int(held),
        num_requests=int(figures["num_requests_running"] + figures["num_requests_waiting"]),
        num_compiles=int(figures["unexpected_compiles_total"]),
    )
