"""Stream pacing: when messages leave, how large they are, and what they tell an eavesdropper."""

from __future__ import annotations

import asyncio
import json
import time

import grpc
import pytest

from jaxserve.client import Client
from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.proto.v1 import inference_pb2 as pb
from jaxserve.server import convert
from jaxserve.server.config import ServerConfig
from jaxserve.server.pacing import IMMEDIATE, MAX_AHEAD_TOKENS, Pacing, paced
from tests.server.http.raw_http import connect, post, request_bytes
from tests.server.scripted_service import text_from, wait_for

STRICT = Pacing(flush_ms=30, pad_bytes=256, strict=True)


def _messages(service, prompt, pacing=None, **settings):
    """Time and size of each message of a gRPC stream, and the messages."""
    request = convert.generate_request(prompt, pacing=pacing, **settings)
    found, messages = [], []
    with grpc.insecure_channel(service.address) as channel:
        call = channel.unary_stream("/jaxserve.v1.Inference/Generate")
        for data in call(request.SerializeToString()):
            found.append((time.monotonic(), len(data)))
            messages.append(pb.GenerateResponse.FromString(data))
    return found, messages


def _text(messages):
    return "".join(message.output.text for message in messages)


def _writes(service, body):
    """Each chunk of a streamed HTTP reply, and when it came."""
    end, data, chunks = connect(service), b"", []
    end.sendall(request_bytes("/v1/completions", body | {"stream": True}))
    while not data.endswith(b"0\r\n\r\n"):
        data += end.recv(1 << 16)
    end.close()
    rest = data.partition(b"\r\n\r\n")[2]
    while rest:
        head, _, rest = rest.partition(b"\r\n")
        size = int(head, 16)
        chunks.append(rest[:size])
        rest = rest[size + 2 :]
    return chunks[:-1]


def _events(chunks):
    lines = b"".join(chunks).decode().split("\n\n")
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


def _http_text(chunks):
    events = _events(chunks)
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])


def test_tokens_wait_for_company_but_for_the_first(service):
    service.executor.step_s = 0.002
    _, messages = _messages(service, "x", Pacing(flush_tokens=8), max_tokens=20)
    counts = [len(message.output.token_ids) for message in messages]
    assert sum(counts) == 20
    assert all(count >= 8 for count in counts[1:-1])
    assert _text(messages) == text_from(1, 20)
    assert messages[-1].HasField("finished")
    assert messages[-1].usage.num_output_tokens == 20


def test_messages_keep_their_distance(service):
    service.executor.step_s = 0.002
    start_s = time.monotonic()
    found, messages = _messages(service, "x", Pacing(flush_ms=60), max_tokens=100)
    assert _text(messages) == text_from(1, 100)
    # All but the last keep it, so the whole takes long enough however arrivals jitter.
    assert found[-1][0] - start_s >= 0.055 * (len(found) - 2)
    assert len(messages) < 50


def test_an_end_does_not_wait(service):
    start_s = time.monotonic()
    _, messages = _messages(service, "x", Pacing(flush_ms=10_000), max_tokens=5)
    assert time.monotonic() - start_s < 5
    assert _text(messages) == text_from(1, 5)


def test_a_request_can_only_ask_for_more(make_service):
    service = make_service(server_settings={"pacing": Pacing(flush_tokens=8, pad_bytes=512)})
    for asked in (None, Pacing(flush_tokens=1, pad_bytes=64)):
        found, messages = _messages(service, "x", asked, max_tokens=30)
        assert {size % 512 for _, size in found} == {0}
        assert all(len(m.output.token_ids) >= 8 for m in messages[1:-1])
    found, _ = _messages(service, "x", Pacing(pad_bytes=1024), max_tokens=30)
    assert {size % 1024 for _, size in found} == {0}
    chunks = _writes(service, {"prompt": "x", "max_tokens": 30})
    assert {len(chunk) % 512 for chunk in chunks} == {0}
    assert _http_text(chunks) == text_from(1, 30)


@pytest.mark.parametrize("pad_bytes", [64, 127, 130, 131, 300])
def test_every_size_can_be_reached(pad_bytes):
    pacing = Pacing(pad_bytes=pad_bytes)
    for length in range(400):
        output = convert.request_output(
            pb.GenerateResponse(output=pb.TokenOutput(text="x" * length, token_ids=[1])), "r"
        )
        for message in convert.responses(output, pacing):
            assert message.ByteSize() % pad_bytes == 0
            assert len(message.SerializeToString()) == message.ByteSize()
            assert message.output.text == "x" * length


def test_strict_streams_look_alike_whatever_they_say(service):
    """Sizes are all equal, and so are the times of departure: one message a tick."""
    looks = set()
    for prompt, settings in (("x", {}), ("y" * 40, {"logprobs": 1})):
        for step_s in (0.0, 0.02):
            service.executor.step_s = step_s
            start_s = time.monotonic()
            found, messages = _messages(service, prompt, STRICT, max_tokens=12, **settings)
            assert _text(messages) == text_from(len(prompt), 12)
            looks |= {size for _, size in found}
            # The first leaves at the first tick, and each at one of its own.
            assert found[-1][0] - start_s >= 0.9 * 0.03 * len(found)
    assert looks == {256}


def test_strict_streams_have_messages_without_tokens(service):
    service.executor.gate.clear()
    request = convert.generate_request("x", pacing=STRICT, max_tokens=3)
    with grpc.insecure_channel(service.address) as channel:
        call = channel.unary_stream("/jaxserve.v1.Inference/Generate")(request.SerializeToString())
        empty = [pb.GenerateResponse.FromString(next(call)) for _ in range(3)]
        assert all([field.name for field, _ in m.ListFields()] == ["pad"] for m in empty)
        service.executor.gate.set()
        assert _text([pb.GenerateResponse.FromString(data) for data in call]) == text_from(1, 3)
    with Client(service.address) as client:
        # The client passes them over.
        outputs = list(client.generate("x", pacing=STRICT, max_tokens=3))
    assert all(output.token_ids or output.finish_reason for output in outputs)


def test_strict_writes_of_http_look_alike(service):
    service.executor.step_s = 0.004
    options = {"flush_ms": 20, "pad_bytes": 1024, "strict": True, "include_usage": True}
    body = {"prompt": "x", "max_tokens": 20, "stream_options": options}
    chunks = _writes(service, body)
    assert {len(chunk) for chunk in chunks} == {1024}
    text = "".join(
        choice["text"] for event in _events(chunks)[:-1] for choice in json.loads(event)["choices"]
    )
    assert text == text_from(1, 20)


def test_the_official_client_reads_padded_streams(make_service):
    import openai

    service = make_service(server_settings={"pacing": STRICT})
    with openai.OpenAI(base_url=f"{service.http_url}/v1", api_key="none", max_retries=0) as client:
        chunks = list(client.completions.create(model="script", prompt="x", stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == text_from(1, 16)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"flush_ms": 0}, "flush_ms"),
        ({"flush_ms": 10_001}, "flush_ms"),
        ({"flush_tokens": 0}, "flush_tokens"),
        ({"flush_tokens": 257}, "flush_tokens"),
        ({"pad_bytes": 63}, "pad_bytes"),
        ({"pad_bytes": 16_385}, "pad_bytes"),
        ({"strict": True}, "strict"),
        ({"strict": True, "flush_ms": 10}, "strict"),
        ({"strict": True, "flush_ms": 10, "pad_bytes": 64, "flush_tokens": 2}, "flush_tokens"),
    ],
)
def test_a_bad_pacing_is_named(service, fields, field):
    with pytest.raises(InvalidRequest) as refusal:
        list(service.client.generate("x", pacing=Pacing(**fields)))
    assert refusal.value.field == f"pacing.{field}"
    body = {"prompt": "x", "stream": True, "stream_options": fields}
    status, _, reply = post(service, "/v1/completions", body)
    assert (status, reply["error"]["param"]) == (400, f"stream_options.{field}")
    flag = "--strict-pacing" if field == "strict" else f"--{field.replace('_', '-')}"
    with pytest.raises(ConfigError, match=flag):
        ServerConfig(pacing=Pacing(**fields))


def test_bounds_themselves_are_fine():
    for pacing in (Pacing(1, 1, 64), Pacing(10_000, 256, 16_384), Pacing(1, None, 64, True)):
        pacing.validate()
    assert IMMEDIATE.of_request(Pacing(), str) == IMMEDIATE


def test_prompt_logprobs_do_not_go_into_a_strict_stream(service):
    with pytest.raises(InvalidRequest) as refusal:
        list(service.client.generate("xyz", pacing=STRICT, prompt_logprobs=1))
    assert refusal.value.field == "response.prompt_logprobs"


def test_leaving_a_paced_stream_ends_the_request(service):
    service.executor.step_s = 0.002
    for pacing in (Pacing(flush_ms=5000), STRICT):
        call = service.client.generate("x", pacing=pacing, max_tokens=400)
        next(iter(call))
        call.cancel()
        service.assert_idle()
    end = connect(service)
    options = {"flush_ms": 5000}
    body = {"prompt": "x", "max_tokens": 400, "stream": True, "stream_options": options}
    end.sendall(request_bytes("/v1/completions", body))
    wait_for(lambda: service.engine.snapshot().num_running == 1)
    end.close()
    service.assert_idle()
    wait_for(lambda: service.num_streams() == 0)


def test_a_failure_comes_through_a_paced_stream(service):
    service.executor.step_s = 0.005
    call = iter(service.client.generate("x", pacing=Pacing(flush_tokens=200), max_tokens=400))
    next(call)
    service.executor.fails = True
    with pytest.raises(grpc.RpcError) as failure:
        list(call)
    assert failure.value.code() is grpc.StatusCode.INTERNAL


def test_the_first_token_does_not_wait_for_time_or_company():
    async def run():
        more = asyncio.Event()

        async def source():
            yield 0  # Without a token, as a chat's opening is.
            yield 1
            await more.wait()
            yield 1
            yield 1

        pacing = Pacing(flush_ms=1, flush_tokens=2)
        batches = paced(source(), pacing, num_tokens=int, fits=lambda _: True)
        first = await anext(batches)
        while sum(first) == 0:
            first += await anext(batches)
        more.set()
        return first, [batch async for batch in batches]

    assert asyncio.run(run()) == ([0, 1], [[1, 1]])


def test_what_is_read_ahead_is_bounded_and_errors_come_last():
    async def run():
        read = 0

        async def source():
            nonlocal read
            for read in range(1, 3000):  # noqa: B007  the count is looked at from outside
                yield "x"
            raise RuntimeError("the end")

        batches = paced(source(), Pacing(flush_ms=1), num_tokens=lambda _: 1, fits=lambda _: True)
        count = len(await anext(batches))
        for _ in range(200):
            await asyncio.sleep(0)
        # Once in the first batch, and once ahead of the next.
        assert read <= 2 * MAX_AHEAD_TOKENS + 2
        try:
            async for batch in batches:
                count += len(batch)
        except RuntimeError:
            return count
        return 0

    assert asyncio.run(run()) >= 2999
