"""Connect and cancel, many times: no page, descriptor, task or stream is lost."""

from __future__ import annotations

import asyncio
import gc

import psutil
import pytest

from jaxserve.client import Client
from jaxserve.engine.config import EngineConfig
from jaxserve.server.lifecycle import Server, serving_of
from tests.server.scripted_service import Service, start_server_loop, wait_for
from tests.server.tiny_model import ENGINE_FLAGS, write_tiny_model

MIB = 1 << 20


def _cycle(service: Service, index: int) -> None:
    """One client that leaves in the queue, in prefill or in decode."""
    with Client(service.address) as client:
        call = client.generate("p" * (1 + 7 * (index % 9)), max_tokens=100, ignore_eos=True)
        if index % 3:
            deltas = iter(call)
            for _ in range(index % 3):
                next(deltas)
        call.cancel()


def _open_things(service: Service) -> tuple[int, int]:
    """Descriptors of the process and tasks of the server's loop, at rest."""
    service.assert_idle(timeout_s=30)
    wait_for(lambda: service.num_streams() == 0)
    gc.collect()

    async def num_tasks() -> int:
        return len(asyncio.all_tasks())

    return psutil.Process().num_fds(), service.call(num_tasks())


def _assert_no_leak(service: Service, num_cycles: int, num_warm_up: int) -> int:
    """Returns by how many bytes the process grew."""
    for index in range(num_warm_up):
        _cycle(service, index)
    before, rss = _open_things(service), psutil.Process().memory_info().rss
    for index in range(num_cycles):
        _cycle(service, index)

    def is_back() -> bool:
        fds, tasks = _open_things(service)
        # Sockets close a moment after their channel.
        return fds <= before[0] + 2 and tasks <= before[1] + 1

    wait_for(is_back, 30)
    return psutil.Process().memory_info().rss - rss


def test_200_connect_cancel_cycles_leak_nothing(service):
    service.executor.step_s = 0.001
    _assert_no_leak(service, num_cycles=200, num_warm_up=30)
    assert list(service.client.generate("still here", max_tokens=2))
    service.assert_idle()


@pytest.mark.soak
def test_10000_connect_cancel_cycles_leak_nothing(tmp_path):
    from jaxserve.engine.startup import start_engine

    running = start_engine(EngineConfig(str(write_tiny_model(tmp_path)), **ENGINE_FLAGS))
    server, loop = start_server_loop()
    client = Client(f"127.0.0.1:{server.grpc_port}")
    service = Service(server, client, running.engine, running.engine._scheduler, None, loop)

    async def make_ready(server: Server) -> None:
        await server.become_ready(serving_of(running))

    service.call(make_ready(server))
    try:
        grown = _assert_no_leak(service, num_cycles=10_000, num_warm_up=500)
        assert grown < 64 * MIB
        assert len(list(client.generate("still here", max_tokens=20, ignore_eos=True))) > 1
        assert client.load().num_compiles_after_ready == 0
        service.assert_idle()
    finally:
        service.close()
        running.close()
