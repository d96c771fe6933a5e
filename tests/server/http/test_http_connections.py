"""Clients that leave, stall or never come to the point cost nobody else anything."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time

import openai
import pytest

from tests.server.http.conftest import client_of
from tests.server.http.raw_http import ask, connect, post, request_bytes
from tests.server.scripted_service import wait_for

LONG = {"prompt": "p" * 200, "max_tokens": 300}


def num_connections(service) -> int:
    return len(service.server._http._connections.connections)


def num_tasks(service) -> int:
    return len(service.server._http._connections.tasks)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("stage", ["queue", "prefill", "decode"])
def test_a_client_that_leaves_ends_its_request_within_two_steps(service, stage, stream):
    executor, others = service.executor, []
    if stage == "queue":
        executor.step_s = 0.005
        others = [service.client.generate("o", max_tokens=400) for _ in range(4)]
        wait_for(lambda: service.engine.snapshot().num_running == 4)
    elif stage == "prefill":
        executor.gate.clear()
    else:
        executor.step_s = 0.01
    with connect(service) as end:
        end.sendall(request_bytes("/v1/completions", LONG | {"stream": stream}))
        if stage == "queue":
            wait_for(lambda: service.engine.snapshot().num_waiting == 1)
        else:
            wait_for(lambda: service.engine.snapshot().num_running == 1)
        if stage == "decode":
            wait_for(lambda: any(plan.decodes for plan in executor.plans))
            executor.gate.clear()
    if stage == "queue":
        wait_for(lambda: service.engine.snapshot().num_waiting == 0)
        for other in others:
            other.cancel()
    else:
        wait_for(lambda: service.engine._inbox._ends)
        num_plans = len(executor.plans)
        executor.gate.set()
        service.assert_idle()
        # The loop may have planned two more before it looked at its inbox.
        assert len(executor.plans) - num_plans <= 2
    service.assert_idle()
    wait_for(lambda: num_tasks(service) == 0 and service.num_streams() == 0)


def test_every_choice_ends_with_its_client(service):
    service.executor.step_s = 0.005
    with connect(service) as end:
        body = LONG | {"n": 4, "stream": True}
        end.sendall(request_bytes("/v1/completions", body))
        assert b"data: " in end.recv(1 << 16) + end.recv(1 << 16)
    wait_for(lambda: service.num_streams() == 0)
    service.assert_idle()


def test_a_stream_that_the_client_closes_early(service, client):
    service.executor.step_s = 0.002
    with client.completions.create(model="script", stream=True, **LONG) as stream:
        next(iter(stream))
    service.assert_idle()
    assert client.completions.create(model="script", prompt="x", max_tokens=2).choices[0].text


def test_a_client_that_stops_reading_is_cut_off(make_service):
    service = make_service(server_settings={"http_stall_timeout_s": 1.0})
    body = {"prompt": ["x"] * 8, "max_tokens": 500, "logprobs": 20, "stream": True}
    with connect(service, receive_buffer=4096) as end:
        end.sendall(request_bytes("/v1/completions", body))
        end.recv(100)
        # The reply does not fit into the buffers, so it waits for the client.
        assert list(service.client.generate("another", max_tokens=3))
        wait_for(lambda: num_tasks(service) == 0 and num_connections(service) == 0, 30)
        received = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := end.recv(1 << 16):
                received += piece
        assert b"[DONE]" not in received[-100:]
    service.assert_idle()


def test_an_unread_stream_is_bounded_in_tokens(service):
    service.server.state.serving.async_engine._max_backlog_tokens = 100
    service.executor.gate.clear()
    body = {"prompt": "x", "max_tokens": 500, "logprobs": 20, "stream": True}

    async def hold_loop() -> None:
        """Nothing is read before the engine has made twice what may be unread."""
        service.executor.gate.set()
        wait_for(lambda: service.engine.metrics.num_generation_tokens > 200, 60)

    with connect(service) as end:
        end.sendall(request_bytes("/v1/completions", body))
        wait_for(lambda: service.engine.snapshot().num_running == 1)
        asyncio.run_coroutine_threadsafe(hold_loop(), service.loop).result(timeout=90)
        received = b""
        while b"0\r\n\r\n" not in received:
            received += end.recv(1 << 16)
    last = [line for line in received.split(b"\n") if line.startswith(b"data: ")][-1]
    assert json.loads(last[6:])["error"]["code"] == "stream_too_slow"
    service.assert_idle()


@pytest.mark.parametrize("start", [b"", b"POST /v1/comp", b"GET /health HTTP/1.1\r\nHost: x\r\n"])
def test_a_head_that_does_not_come_to_its_end_is_cut_off(make_service, start):
    service = make_service(server_settings={"http_head_timeout_s": 0.2})
    with connect(service) as end:
        end.sendall(start)
        started_s = time.monotonic()
        with contextlib.suppress(ConnectionResetError):
            assert end.recv(10) == b""
        assert time.monotonic() - started_s < 5
    wait_for(lambda: num_connections(service) == 0)


def test_a_head_in_pieces_has_one_limit_for_all(make_service):
    service = make_service(server_settings={"http_head_timeout_s": 0.3})
    with connect(service) as end:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(100):
                end.sendall(b"GET /health HTTP/1.1\r\nx: " if _ == 0 else b"y")
                time.sleep(0.05)
        wait_for(lambda: num_connections(service) == 0, 1)


def test_a_body_that_does_not_come_is_answered_in_time(make_service):
    service = make_service(server_settings={"http_body_timeout_s": 0.2})
    with connect(service) as end:
        end.sendall(request_bytes("/v1/completions", LONG)[:-5])
        assert end.recv(4096).startswith(b"HTTP/1.1 408")
    service.assert_idle()


def test_a_kept_connection_serves_again(make_service):
    service = make_service(server_settings={"http_head_timeout_s": 0.2})
    with client_of(service) as client:
        for _ in range(3):
            reply = client.completions.create(model="script", prompt="x", max_tokens=2)
            assert reply.choices[0].text
            time.sleep(0.25)  # Longer than a head may take; an idle connection may stay.
        assert num_connections(service) == 1


def test_what_is_no_http_is_refused(service):
    with connect(service) as end:
        end.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert end.recv(100).startswith(b"HTTP/1.1 400")


def test_draining_finishes_streams_and_refuses_the_new(service):
    service.executor.step_s = 0.005
    text, reason = [], []

    def read() -> None:
        with client_of(service) as client:
            body = {"model": "script", "prompt": "x", "max_tokens": 100, "stream": True}
            for chunk in client.completions.create(**body):
                text.append(chunk.choices[0].text)
                reason.append(chunk.choices[0].finish_reason)

    reading = threading.Thread(target=read)
    reading.start()
    wait_for(lambda: text)
    draining = threading.Thread(target=lambda: service.call(service.server.drain()))
    draining.start()
    wait_for(lambda: service.server.state.draining)
    status, _, reply = post(service, "/v1/completions", {"prompt": "x"})
    assert (status, reply["error"]["code"]) == (503, "not_accepting")
    assert ask(service, "GET", "/health/ready")[0] == 503
    draining.join()
    reading.join()
    assert len("".join(text)) == 100
    assert reason[-1] == "length"


def test_an_abort_and_a_failure_end_a_stream_with_an_error(service):
    service.executor.step_s = 0.005
    for end, code in (("abort", "cancelled"), ("failure", "internal_error")):
        with client_of(service) as client:
            stream = client.completions.create(
                model="script", stream=True, extra_headers={"x-request-id": end}, **LONG
            )
            next(iter(stream))
            if end == "abort":
                assert service.client.abort("abort")
            else:
                service.executor.fails = True
            with pytest.raises(openai.APIError) as failure:
                list(stream)
            assert failure.value.code == code
            assert "secret" not in str(failure.value)


@pytest.mark.parametrize("stream", [False, True])
def test_a_lost_engine_ends_answers_as_unavailable(service, stream):
    service.executor.gate.clear()
    answers = []

    def ask_for_text() -> None:
        answers.append(post(service, "/v1/completions", LONG | {"stream": stream}))

    asking = threading.Thread(target=ask_for_text)
    asking.start()
    wait_for(lambda: service.engine.snapshot().num_running == 1)
    service.call(service.server.lose("a process of the group is gone: restart the server"))
    asking.join(timeout=10)
    [(status, _, reply)] = answers
    if stream:
        assert status == 200
        reply = json.loads(reply.removeprefix("data: "))
    else:
        assert status == 503
    assert reply["error"]["code"] == "engine_lost"
    assert reply["error"]["message"].startswith("a process of the group is gone")
    assert ask(service, "GET", "/health")[0] == 503
