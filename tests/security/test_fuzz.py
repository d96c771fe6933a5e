"""Bytes that nobody should send: an answer or a clean refusal, and a server that goes on."""

from __future__ import annotations

import contextlib
import random
import socket
import threading

import grpc
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxserve.client import Client
from jaxserve.proto.v1 import inference_pb2 as pb
from jaxserve.server import convert
from jaxserve.server.http.schema import ChatRequest, CompletionRequest
from tests.server.http.raw_http import connect, post, request_bytes
from tests.server.scripted_service import start_service, wait_for

MIB = 1 << 20
NAMES = sorted(
    {*CompletionRequest.model_fields, *ChatRequest.model_fields, "role", "content", "type"}
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=20),
    st.sampled_from([2**31, 2**63, 2**64, -1, 0, 1e308, "", "\x00", "text", "user"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.sampled_from(NAMES), inner, max_size=4)
    ),
    max_leaves=12,
)
BODIES = st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=6)


@pytest.fixture(scope="module")
def shared():
    service = start_service()
    service.make_ready()
    yield service
    assert not service.engine.snapshot().failed
    assert list(service.client.generate("still here", max_tokens=2))
    service.assert_idle()
    service.close()


@settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(["/v1/completions", "/v1/chat/completions", "/tokenize"]), body=BODIES)
def test_any_json_is_answered_or_refused(shared, path, body):
    base = {"/v1/completions": {"prompt": "x"}, "/tokenize": {"prompt": "x"}}.get(
        path, {"messages": [{"role": "user", "content": "x"}]}
    )
    limit = {} if path == "/tokenize" else {"max_tokens": 2}
    for whole in (body, base | limit | body):
        status, _, reply = post(shared, path, whole)
        assert status == 200 or 400 <= status < 500, reply
        assert "Traceback" not in str(reply)


def _recorded(shared) -> bytes:
    """What a gRPC client sends for one request, as a proxy sees it."""
    sent = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as door:

        def relay() -> None:
            client, _ = door.accept()
            server = socket.create_connection(("127.0.0.1", shared.server.grpc_port))

            def back() -> None:
                with contextlib.suppress(OSError):
                    while data := server.recv(1 << 16):
                        client.sendall(data)

            thread = threading.Thread(target=back, daemon=True)
            thread.start()
            with contextlib.suppress(OSError):
                while data := client.recv(1 << 16):
                    sent.extend(data)
                    server.sendall(data)
            server.close()
            client.close()

        thread = threading.Thread(target=relay, daemon=True)
        thread.start()
        with Client(f"127.0.0.1:{door.getsockname()[1]}") as client:
            list(client.generate("hello there", max_tokens=2, request_id="recorded"))
        thread.join(10)
    return bytes(sent)


def test_mutated_http2_frames_harm_nobody(shared):
    raw, rng = _recorded(shared), random.Random(4)
    assert raw.startswith(b"PRI * HTTP/2.0")
    for _ in range(60):
        data = bytearray(raw)
        for _ in range(rng.randint(1, 6)):
            # The preface stays, else every one is refused by its first byte.
            index = rng.randrange(24, len(data))
            kind = rng.randrange(3)
            if kind == 0:
                data[index] ^= 1 << rng.randrange(8)
            elif kind == 1:
                del data[index : index + rng.randint(1, 9)]
            else:
                data[index:index] = rng.randbytes(rng.randint(1, 9))
        address = ("127.0.0.1", shared.server.grpc_port)
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as end:
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)
            while end.recv(1 << 16):
                pass
    # grpcio's server may have ended (see below); then another one comes.
    wait_for(shared.client.is_serving, 60)


def test_a_methods_name_that_is_no_text_ends_neither_streams_nor_the_service(service):
    """grpcio ends its own server at it."""
    raw = _recorded(service)
    name = b"/jaxserve.v1.Inference/Generate"
    assert raw.count(name) == 1
    bad = raw.replace(name, name.replace(b"n", b"\xee"))
    service.server.state.degraded_after_s = 600.0
    stream = iter(service.client.generate("x", max_tokens=400, request_id="long"))
    next(stream)
    service.executor.gate.clear()  # So that it is not over before the rest is.
    port = service.server._grpc
    for count in (1, 2):
        wait_for(service.client.is_serving, 60)
        with socket.create_connection(("127.0.0.1", port.port), timeout=5) as end:
            end.sendall(bad)
            wait_for(lambda count=count: port.num_restarts == count, 60)
    service.executor.gate.set()
    service.executor.step_s = 0.02
    with Client(service.address) as client:
        client.wait_until_serving(60)
        assert list(client.generate("y", max_tokens=2))
        assert next(stream).text
        assert client.abort("long")
    assert [output.finish_reason for output in stream][-1] == "cancelled"
    service.assert_idle()


def test_mutated_http1_requests_harm_nobody(shared):
    raw, rng = request_bytes("/v1/completions", {"prompt": "x", "max_tokens": 2}), random.Random(5)
    for _ in range(120):
        data = bytearray(raw)
        for _ in range(rng.randint(1, 4)):
            index = rng.randrange(len(data))
            data[index] = rng.randrange(256)
        end = connect(shared)
        with contextlib.suppress(ConnectionError):
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)
            reply = end.recv(1 << 16)
            assert not reply.startswith(b"HTTP/1.1 5")
            assert b"Traceback" not in reply
        end.close()
    wait_for(shared.client.is_serving, 60)


def test_a_message_above_4_mib_costs_no_memory(shared):
    data = pb.GenerateRequest(text=pb.TextPrompt(text="x" * (4 * MIB))).SerializeToString()
    assert len(data) > 4 * MIB
    with grpc.insecure_channel(shared.address) as channel:
        method = channel.unary_stream("/jaxserve.v1.Inference/Generate")

        def refused() -> None:
            with pytest.raises(grpc.RpcError) as refusal:
                list(method(data))
            assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED

        for _ in range(3):  # This process is the client, too, whose own buffers are here by now.
            refused()
        before = psutil.Process().memory_info().rss
        for _ in range(20):
            refused()
        # 80 MiB were sent. What comes and goes is the client's.
        assert psutil.Process().memory_info().rss - before < 32 * MIB


def _nested(depth: int) -> bytes:
    """A group of an unknown field inside another, and so on."""
    return b"\xfb\x3f" * depth + b"\xfc\x3f" * depth


def test_deep_nesting_is_refused(shared):
    known = convert.generate_request("x", max_tokens=1).SerializeToString()
    with grpc.insecure_channel(shared.address) as channel:
        method = channel.unary_stream("/jaxserve.v1.Inference/Generate")
        for depth in (1, 200, 100_000):
            with pytest.raises(grpc.RpcError) as refusal:
                list(method(known + _nested(depth)))
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT, depth
    for depth in (200, 100_000):
        nested = b'{"messages": ' + b"[" * depth + b"]" * depth + b"}"
        assert post(shared, "/v1/chat/completions", nested)[0] == 400


NAMES_THAT_LEAD_AWAY = [
    "../script", "..%2fscript", "%2e%2e/script", "/etc/passwd", "//script", "script/", "script%00",
    "script/../script", "\u2024\u2024/script", "\uff0e\uff0e/script", "script\\..\\x", "~/script",
    "script.gguf",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES_THAT_LEAD_AWAY)
def test_a_models_name_is_never_a_path(shared, name):
    body = {"model": name, "prompt": "x", "max_tokens": 1}
    status, _, reply = post(shared, "/v1/completions", body)
    assert (status, reply["error"]["code"]) == (404, "model_not_found")
    assert "passwd" not in str(reply)
    quoted = name.encode("ascii", "backslashreplace").decode().replace("\\", "%5c")
    end = connect(shared)
    end.sendall(f"GET /v1/models/{quoted} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert end.recv(1 << 16).startswith((b"HTTP/1.1 404", b"HTTP/1.1 400"))
    end.close()
