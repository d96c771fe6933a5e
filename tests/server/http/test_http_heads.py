"""Heads and bodies as no client library writes them: what is malformed, endless or ambiguous is
refused, and what one request brings reaches no other."""

from __future__ import annotations

import contextlib
import json
import socket
import time

import pytest

from jaxserve.server.http.connection import MAX_PIPELINED
from tests.server.http.raw_http import connect, request_bytes
from tests.server.scripted_service import ready_service, wait_for

BODY = {"prompt": "x", "max_tokens": 2}
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def shared():
    with ready_service() as service:
        yield service


def answers(service, data: bytes, count: int = 1) -> bytes:
    """What comes until so many replies have begun and nothing follows, or the end."""
    with connect(service) as end:
        end.sendall(data)
        received = b""
        end.settimeout(3)
        with contextlib.suppress(TimeoutError, ConnectionResetError):
            while piece := end.recv(1 << 16):
                received += piece
                if received.count(b"HTTP/1.1 ") >= count and received.endswith(
                    (b"}", b"0\r\n\r\n")
                ):
                    break
        return received


def statuses(received: bytes) -> list[int]:
    parts = received.split(b"HTTP/1.1 ")[1:]
    return [int(part[:3]) for part in parts]


def chunked(*headers: bytes, trailers: bytes = b"") -> bytes:
    data = json.dumps(BODY).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += b"".join(header + b"\r\n" for header in headers)
    return (
        (head + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n" % (len(data), data))
        + trailers
        + b"\r\n"
    )


@pytest.mark.parametrize(
    "data",
    [
        HEALTH + b"x y: 1\r\n\r\n",
        HEALTH + b"x: a\x00b\r\n\r\n",
        HEALTH + b"x: a\nb: c\n\r\n",
        HEALTH + b" folded: x\r\n\r\n",
        HEALTH + b"no colon\r\n\r\n",
        b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
        b"FETCH /health HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n",
        chunked(b"Content-Length: 4"),
        request_bytes("/v1/completions", BODY).replace(
            b"Content-Length", b"Content-Length: 3\r\nContent-Length"
        ),
        request_bytes("/v1/completions", BODY).replace(b"Length: ", b"Length: +"),
        request_bytes("/v1/completions", BODY).replace(b"Length: ", b"Length: -"),
        b"GET /health HTTP/1.1\r\n\r\n",
        HEALTH + b"Host: localhost\r\n\r\n",
    ],
)
def test_a_malformed_or_ambiguous_head_is_refused(shared, data):
    received = answers(shared, data)
    assert statuses(received) == [400], received[:200]
    assert b"Traceback" not in received


def test_a_coded_body_is_not_taken_for_a_plain_one(shared):
    assert statuses(answers(shared, chunked(b"Transfer-Encoding: gzip"))) == [501]
    assert statuses(answers(shared, chunked().replace(b"g: chunked", b"g: gzip, chunked"))) == [501]


def test_a_chunk_size_that_is_no_number_ends_the_connection(shared):
    data = chunked().replace(b"\r\n\r\n", b"\r\n\r\nzz", 1)
    assert statuses(answers(shared, data)) == [400]


def test_an_endless_head_is_ended(shared):
    with connect(shared) as end, contextlib.suppress(ConnectionError):
        end.sendall(HEALTH + b"x: ")
        for _ in range(40):
            end.sendall(b"y" * 1000)
            time.sleep(0.001)
        assert end.recv(100).startswith(b"HTTP/1.1 400")
        assert end.recv(1000) is not None
    connections = shared.server._http._connections.connections
    wait_for(lambda: not any(one._is_in_head for one in connections))


def test_a_long_head_that_comes_at_once_is_431(shared):
    assert statuses(answers(shared, HEALTH + b"x: " + b"y" * 9000 + b"\r\n\r\n")) == [431]


def test_many_short_headers_count_together(shared):
    assert statuses(answers(shared, HEALTH + b"a: b\r\n" * 5000 + b"\r\n")) == [431]


def test_trailers_change_no_request_and_have_a_bound(shared):
    after = HEALTH + b"\r\n"
    trailers = b"x-request-id: of-the-trailer\r\nHost: foreign\r\n"
    received = answers(shared, chunked(trailers=trailers) + after, count=2)
    assert statuses(received) == [200, 200]
    assert b"of-the-trailer" not in received
    received = answers(shared, chunked(b"x-request-id: own", trailers=b"t: u\r\n" * 4000))
    assert statuses(received) == [400]
    shared.assert_idle()


def test_pipelined_requests_are_answered_in_turn(shared):
    ask = request_bytes("/v1/completions", BODY)
    received = answers(shared, ask + HEALTH + b"\r\n" + ask, count=3)
    assert statuses(received) == [200, 200, 200]
    assert received.index(b'"choices"') < received.index(b"ready\n") < received.rindex(b'"choices"')


def test_many_pipelined_requests_end_their_connection(service):
    service.executor.gate.clear()
    with connect(service) as end:
        end.sendall(
            request_bytes("/v1/completions", BODY) + (HEALTH + b"\r\n") * (MAX_PIPELINED + 2)
        )
        assert end.recv(100).startswith(b"HTTP/1.1 400")
    service.executor.gate.set()
    wait_for(lambda: not service.server._http._connections.connections)
    service.assert_idle()


def test_an_upgrade_is_not_taken_and_harms_no_request(shared):
    """Java's client and curl's `--http2` ask for one with their first request."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"
    ask = request_bytes("/v1/completions", BODY)
    asked = ask.replace(b"Host:", upgrade + b"Host:", 1)
    in_chunks = chunked(upgrade.removesuffix(b"\r\n"))
    with connect(shared) as end:
        for data in (asked, ask, in_chunks, HEALTH + upgrade + b"\r\n", asked):
            end.sendall(data[:-3])
            time.sleep(0.02)
            end.sendall(data[-3:])
            received = b""
            while not received.endswith((b"}", b"ready\n")):
                received += end.recv(1 << 16)
            assert statuses(received) == [200]
    received = answers(shared, asked + (HEALTH + upgrade + b"\r\n") * 3 + ask, count=5)
    assert statuses(received) == [200] * 5


def test_replies_that_nobody_reads_do_not_pile_up(shared):
    nowhere = (b"GET /nowhere HTTP/1.1\r\nHost: foreign\r\n\r\n") * 5000
    with connect(shared, receive_buffer=4096) as end, contextlib.suppress(OSError):
        end.settimeout(1)
        for _ in range(40):
            end.sendall(nowhere)
        for one in tuple(shared.server._http._connections.connections):
            assert one.transport.get_write_buffer_size() < 1 << 19
    wait_for(lambda: not shared.server._http._connections.connections)


def test_old_http_closes_after_its_reply(shared):
    received = answers(shared, b"GET /health HTTP/1.0\r\n\r\n")
    assert statuses(received) in ([200], [403])
    assert b"connection: close" in received


def test_a_refusal_leaves_the_connection_in_step(service):
    """What is refused by its head is answered before its body came, which is then left out."""
    service.executor.gate.clear()
    fill = [service.client.generate("o", max_tokens=5) for _ in range(14)]
    wait_for(lambda: service.engine.snapshot().num_waiting == 8)
    ask = request_bytes("/v1/completions", BODY)
    with connect(service) as end:
        for _ in range(2):
            end.sendall(ask[:-4])
            reply = end.recv(1 << 16)
            assert reply.startswith(b"HTTP/1.1 429")
            assert b"retry-after: " in reply
            assert json.loads(reply.partition(b"\r\n\r\n")[2])["error"]["code"] == "queue_full"
            end.sendall(ask[-4:])
        end.sendall(HEALTH + b"\r\n")
        assert end.recv(100).startswith(b"HTTP/1.1 200")
    for one in fill:
        one.cancel()
    service.executor.gate.set()
    service.assert_idle()


def test_connections_bound_how_long_nothing_is_taken(make_service):
    service = make_service(server_settings={"http_stall_timeout_s": 6.0})
    with connect(service):
        connections = service.server._http._connections.connections
        wait_for(lambda: len(connections) == 1)
        [one] = connections
        end = one.transport.get_extra_info("socket")
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 6000
        assert end.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 3
        assert end.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 1
