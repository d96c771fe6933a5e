"""Connect and leave, many times: no page, descriptor, task, stream or connection is lost."""

from __future__ import annotations

import asyncio
import gc

import psutil

from tests.server.http.raw_http import connect, post, request_bytes
from tests.server.scripted_service import Service, wait_for


def _cycle(service: Service, index: int) -> None:
    """One client that leaves in the queue, in prefill or in decode, whole or streaming."""
    body = {"prompt": "p" * (1 + 7 * (index % 9)), "max_tokens": 100, "stream": index % 2 == 0}
    with connect(service) as end:
        end.sendall(request_bytes("/v1/completions", body | {"n": 1 + index % 3}))
        if index % 4 == 0:
            end.recv(1000)


def _open_things(service: Service) -> tuple[int, int, int]:
    """Descriptors, tasks of the server's loop and HTTP connections, at rest."""
    service.assert_idle(timeout_s=30)
    wait_for(lambda: service.num_streams() == 0)
    gc.collect()

    async def num_tasks() -> int:
        return len(asyncio.all_tasks())

    connections = service.server._http._connections.connections
    return psutil.Process().num_fds(), service.call(num_tasks()), len(connections)


def test_200_clients_that_leave_cost_nothing_lasting(make_service):
    service = make_service(max_queued_requests=64)
    service.executor.step_s = 0.001
    for index in range(20):
        _cycle(service, index)
    wait_for(lambda: _open_things(service)[2] == 0, 30)
    before = _open_things(service)
    for index in range(200):
        _cycle(service, index)

    def is_back() -> bool:
        fds, tasks, connections = _open_things(service)
        return fds <= before[0] + 1 and tasks <= before[1] + 1 and connections == 0

    wait_for(is_back, 30)
    assert post(service, "/v1/completions", {"prompt": "still here"})[0] == 200
    service.assert_idle()
