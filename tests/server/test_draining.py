"""A drain hands over what was promised, and nobody is told that they gave up themselves."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections import Counter
from collections.abc import Callable

import grpc
import pytest

from jaxserve.errors import NotAccepting
from jaxserve.proto.v1 import inference_pb2 as pb
from jaxserve.proto.v1 import inference_pb2_grpc
from jaxserve.server import convert, lifecycle
from jaxserve.server.pacing import MAX_PAD_BYTES, Pacing
from tests.server.http.raw_http import connect, request_bytes
from tests.server.scripted_service import Service, wait_for

NUM_CLIENTS = 40
NUM_CHANNELS = 4
NUM_TOKENS = 60
LONG_DRAIN = {"drain_timeout_s": 60.0}
NO_WIDER_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65535)]


class Drain:
    """Of a service, in a thread."""

    def __init__(self, service: Service) -> None:
        self._thread = threading.Thread(target=self._run, args=(service,))
        self._thread.start()
        wait_for(lambda: service.server.state.draining)

    def _run(self, service: Service) -> None:
        future = asyncio.run_coroutine_threadsafe(service.server.drain(), service.loop)
        self._result = future.result(timeout=120)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def result(self) -> bool:
        self._thread.join(120)
        return self._result


def _large_answer() -> pb.GenerateRequest:
    """Of more than lies in any buffer."""
    pacing = Pacing(pad_bytes=MAX_PAD_BYTES)
    return convert.generate_request("x", max_tokens=450, ignore_eos=True, pacing=pacing)


def test_a_stream_that_is_read_late_is_read_whole(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by this grace: the client has the time that there is to drain.
    monkeypatch.setattr(lifecycle, "FLUSH_GRACE_S", 0.01)
    service = make_service(server_settings=LONG_DRAIN)
    with grpc.insecure_channel(service.address, NO_WIDER_WINDOW) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(_large_answer())
        next(call)
        # The engine has nothing to do any more; most of the answer is not sent.
        wait_for(service.is_idle)
        assert service.server.state.promises.num_open == 1
        drain = Drain(service)
        with pytest.raises(NotAccepting, match="draining"):
            list(service.client.generate("x"))
        assert drain.is_running
        assert sum(len(message.output.token_ids) for message in call) == 449
        assert call.code() is grpc.StatusCode.OK
    assert drain.result()
    assert service.server.state.promises.num_open == 0


def test_a_stream_that_nobody_reads_ends_with_the_time_to_drain(
    make_service: Callable[..., Service], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lifecycle, "FLUSH_GRACE_S", 0.1)
    service = make_service(server_settings={"drain_timeout_s": 0.1})
    with grpc.insecure_channel(service.address, NO_WIDER_WINDOW) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(_large_answer())
        next(call)
        wait_for(service.is_idle)
        assert not Drain(service).result()
        with pytest.raises(grpc.RpcError):
            list(call)
        assert call.code() is grpc.StatusCode.UNAVAILABLE


def test_what_does_not_end_in_time_is_cut_short_as_unavailable(
    make_service: Callable[..., Service],
) -> None:
    service = make_service(server_settings={"drain_timeout_s": 0.05})
    service.executor.step_s = 0.02
    deltas = iter(service.client.generate("x", max_tokens=400))
    assert next(deltas).finish_reason is None
    drain = Drain(service)
    with pytest.raises(NotAccepting, match="send the request elsewhere"):
        list(deltas)
    assert not drain.result()


async def _ask_until_it_is_gone(address: str, codes: Counter[str]) -> None:
    """Clients that ask again almost at once, whatever they are told, until nobody listens."""
    channels = [
        grpc.aio.insecure_channel(address, [("grpc.use_local_subchannel_pool", 1)])
        for _ in range(NUM_CHANNELS)
    ]
    request = convert.generate_request("x", max_tokens=NUM_TOKENS, ignore_eos=True)

    async def live(stub: inference_pb2_grpc.InferenceStub) -> None:
        is_gone = False
        while not is_gone:
            call, num_tokens = stub.Generate(request), 0
            try:
                async for message in call:
                    num_tokens += len(message.output.token_ids)
                codes["whole" if num_tokens == NUM_TOKENS else "short"] += 1
            except grpc.aio.AioRpcError as error:
                code, details = error.code().name, error.details() or ""
                codes[code if num_tokens == 0 else f"{code} in mid-stream"] += 1
                is_gone = code != "RESOURCE_EXHAUSTED" and "draining" not in details
                await asyncio.sleep(0.005)

    stubs = [inference_pb2_grpc.InferenceStub(channel) for channel in channels]
    await asyncio.gather(*(live(stubs[index % NUM_CHANNELS]) for index in range(NUM_CLIENTS)))
    for channel in channels:
        await channel.close()


def test_of_many_clients_none_is_cancelled(make_service: Callable[..., Service]) -> None:
    service = make_service(server_settings=LONG_DRAIN)
    service.executor.step_s = 0.002
    codes: Counter[str] = Counter()
    crowd = threading.Thread(
        target=lambda: asyncio.run(_ask_until_it_is_gone(service.address, codes))
    )
    crowd.start()
    wait_for(lambda: codes["whole"] >= 4, timeout_s=240)
    assert Drain(service).result()
    crowd.join(120)
    assert codes.keys() == {"whole", "RESOURCE_EXHAUSTED", "UNAVAILABLE"}, codes


def test_a_refusal_waits_for_no_message(service: Service) -> None:
    service.server.state.draining = True
    messages: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    with grpc.insecure_channel(service.address) as channel:
        generate = channel.stream_stream("/jaxserve.v1.Inference/Generate")
        call = generate(iter(messages.get, b"no more"), timeout=60)
        with pytest.raises(grpc.RpcError):
            next(call)
        assert call.code() is grpc.StatusCode.UNAVAILABLE
        assert call.details() == "the server is draining: use another one"
        messages.put(b"no more")
    assert service.server.state.num_refused["not_accepting"] == 1


def test_a_refusal_over_http_waits_for_no_body(service: Service) -> None:
    service.server.state.draining = True
    head = request_bytes("/v1/completions", {"prompt": "x"}).partition(b"\r\n\r\n")[0]
    with connect(service) as end:
        end.sendall(head + b"\r\n\r\n")
        assert end.recv(1000).startswith(b"HTTP/1.1 503")
    assert service.server.state.num_refused["not_accepting"] == 1


def test_an_http_reply_that_lies_here_is_handed_over(
    make_service: Callable[..., Service],
) -> None:
    """A reply is over for its handler when this process has it, not for its client."""
    service = make_service(server_settings=LONG_DRAIN)
    connections = service.server._http._connections
    body = {"prompt": ["x"] * 8, "max_tokens": 500, "logprobs": 20}
    with connect(service, receive_buffer=4096) as end:
        end.sendall(request_bytes("/v1/completions", body))
        received = end.recv(100)
        wait_for(lambda: not connections.tasks, timeout_s=30)
        assert connections.connections
        drain = Drain(service)
        wait_for(lambda: service.server._http._server.sockets == ())
        assert drain.is_running
        while piece := end.recv(1 << 16):
            received += piece
    assert drain.result()
    head, _, content = received.partition(b"\r\n\r\n")
    assert f"content-length: {len(content)}" in head.decode().lower()
