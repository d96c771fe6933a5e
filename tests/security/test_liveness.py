"""Live means that work gets done."""

from __future__ import annotations

import threading

from jaxserve.proto.v1 import control_pb2
from jaxserve.server.state import Phase
from tests.security.keys import write_keys
from tests.server.http.raw_http import ask
from tests.server.scripted_service import SetClock, wait_for


def test_work_without_steps_is_degraded_though_no_step_hangs(make_service):
    """A loop that hangs itself has no step in flight, so nothing but progress shows it."""
    clock = SetClock()
    service = make_service(clock=clock)
    state, scheduler = service.server.state, service.scheduler
    hangs, may_go = threading.Event(), threading.Event()
    plan = scheduler.plan

    def hanging(now_s):
        hangs.set()
        assert may_go.wait(60)
        return plan(now_s)

    scheduler.plan = hanging
    call = service.client.generate("x", max_tokens=3)
    wait_for(hangs.is_set, 30)
    wait_for(lambda: scheduler.has_work)
    assert service.engine.snapshot().step_in_flight_s is None
    assert state.phase is Phase.READY
    clock.now_s += state.degraded_after_s - 1
    assert state.phase is Phase.READY
    clock.now_s += 2
    assert state.phase is Phase.DEGRADED
    assert ask(service, "GET", "/health")[0] == 503
    wait_for(lambda: not service.client.is_serving(), 30)
    assert service.client.server_info().state == control_pb2.SERVER_STATE_DEGRADED
    may_go.set()
    assert list(call)
    service.assert_idle()
    assert state.phase is Phase.READY


def test_an_idle_server_is_ready_however_long(make_service):
    clock = SetClock()
    service = make_service(clock=clock)
    for _ in range(3):
        clock.now_s += 10_000
        assert service.server.state.phase is Phase.READY
        assert service.engine.snapshot().stalled_s is None
        list(service.client.generate("x", max_tokens=2))
        service.assert_idle()


def test_health_needs_no_key_and_tells_nothing_else(make_service, tmp_path):
    path = write_keys(tmp_path / "keys.toml")
    service = make_service(server_settings={"api_keys_file": path}, ready=False)
    assert ask(service, "GET", "/health")[::2] == (200, "starting\n")
    assert ask(service, "GET", "/health/ready")[::2] == (503, "starting\n")
    service.make_ready()
    assert ask(service, "GET", "/health/ready")[::2] == (200, "ready\n")
    assert service.client.is_serving()
