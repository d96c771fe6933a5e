"""Bad input is INVALID_ARGUMENT naming the field, and harms nobody."""

from __future__ import annotations

import contextlib
import logging
import math
import time

import grpc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import InvalidRequest
from jaxserve.proto.v1 import inference_pb2 as pb
from jaxserve.proto.v1 import inference_pb2_grpc
from jaxserve.server import convert
from tests.server.scripted_service import MODEL_CONFIG, Service, ready_service

VOCAB = MODEL_CONFIG.vocab_size
CONTEXT = 512
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module")
def shared():
    """One service for the whole table: a refused request must leave no trace."""
    with ready_service() as service:
        yield service


BAD_SETTINGS = {
    "temperature": [-0.01, 100.1, NAN, INF, -INF],
    "top_k": [VOCAB + 1, 2**32 - 1],
    "top_p": [0.0, -0.1, 1.001, NAN, INF],
    "min_p": [-0.001, 1.001, NAN],
    "repetition_penalty": [0.0, -1.0, 100.1, NAN, INF],
    "presence_penalty": [-2.01, 2.01, NAN],
    "frequency_penalty": [-2.01, 2.01, NAN],
    "logit_bias": [
        {VOCAB: 1.0},
        {0: 100.1},
        {0: -100.1},
        {0: NAN},
        [(1, 1.0), (1, 2.0)],
        [(index, 0.0) for index in range(1025)],
    ],
    "allowed_token_ids": [[], [VOCAB], [0] * (VOCAB + 1)],
    "constraint": [{}],
    "bad_token_ids": [[VOCAB], list(range(VOCAB)), [0] * (VOCAB + 1)],
    "max_tokens": [0, 2**31],
    "min_tokens": [2**31, CONTEXT],
    "stop": [[""], ["x" * 257], ["x"] * 17],
    "stop_token_ids": [[VOCAB], [0] * 17],
    "logprobs": [21],
    "prompt_logprobs": [21],
}
EDGE_SETTINGS = {
    "temperature": [0.0, -0.0, 100.0],
    "top_k": [0, VOCAB],
    "top_p": [1e-6, 1.0],
    "min_p": [0.0, 1.0],
    "seed": [0, 2**64 - 1],
    "repetition_penalty": [0.01, 100.0],
    "presence_penalty": [-2.0, 2.0],
    "frequency_penalty": [-2.0, 2.0],
    "logit_bias": [{0: 100.0, VOCAB - 1: -100.0}],
    "allowed_token_ids": [[0], list(range(VOCAB))],
    "constraint": [{"choice": ["x"] * 1024}, {"regex": "a" * 4096}, {"json_object": True}],
    "bad_token_ids": [list(range(1, VOCAB))],
    "max_tokens": [1, 2],
    "min_tokens": [0, 2],
    "stop": [["x" * 256] * 16],
    "stop_token_ids": [[VOCAB - 1] * 16],
    "ignore_eos": [False, True],
    "include_stop_str_in_output": [False, True],
    "skip_special_tokens": [False, True],
    "logprobs": [0, 20],
    "prompt_logprobs": [0, 20],
}


def _cases(table):
    return [(name, value) for name, values in table.items() for value in values]


def test_every_setting_is_in_the_protocol_and_in_the_tables():
    names = set(SamplingParams.__dataclass_fields__)
    assert set(convert.SETTING_PATHS) == names
    assert set(EDGE_SETTINGS) == names
    unbounded = {"seed", "ignore_eos", "include_stop_str_in_output", "skip_special_tokens"}
    assert set(BAD_SETTINGS) == names - unbounded


@pytest.mark.parametrize(("name", "value"), _cases(BAD_SETTINGS))
def test_a_setting_out_of_bounds_is_named(shared: Service, name, value):
    with pytest.raises(InvalidRequest) as refusal:
        list(shared.client.generate("x", **{"max_tokens": None, name: value}))
    assert refusal.value.field == convert.SETTING_PATHS[name]
    assert str(refusal.value.__cause__.details()).startswith(f"{refusal.value.field}: ")


@pytest.mark.parametrize(("name", "value"), _cases(EDGE_SETTINGS))
def test_a_setting_at_its_bound_is_served(shared: Service, name, value):
    outputs = list(shared.client.generate("x", **{"max_tokens": 2, name: value}))
    assert outputs[-1].usage.num_output_tokens >= 1


def test_min_tokens_above_max_tokens(shared: Service):
    with pytest.raises(InvalidRequest) as refusal:
        list(shared.client.generate("x", min_tokens=3, max_tokens=2))
    assert refusal.value.field == "stopping.min_tokens"


BAD_REQUESTS = [
    ("prompt", {}),
    ("text.text", {"text": {"text": ""}}),
    ("text.text", {"text": {"text": "x" * CONTEXT}}),
    ("text.text", {"text": {"text": "x" * (64 << 10) + "x"}}),
    ("token_ids.ids", {"token_ids": {"ids": []}}),
    ("token_ids.ids", {"token_ids": {"ids": [VOCAB]}}),
    ("token_ids.ids", {"token_ids": {"ids": [2**32 - 1]}}),
    ("token_ids.ids", {"token_ids": {"ids": [1] * CONTEXT}}),
    ("token_ids.ids", {"token_ids": {"ids": [1] * (CONTEXT + 1)}}),
    ("chat.messages", {"chat": {"messages": []}}),
    ("chat.messages", {"chat": {"messages": [{"role": "user"}] * 1025}}),
    ("chat.messages", {"chat": {"messages": [{"role": "pirate", "content": "ahoy"}]}}),
    ("chat.messages.role", {"chat": {"messages": [{"content": "who am I"}]}}),
    ("chat.messages.role", {"chat": {"messages": [{"role": "r" * 65, "content": "x"}]}}),
    (
        "chat.messages.content",
        {"chat": {"messages": [{"role": "user", "content": "x" * (33 << 10)}] * 2}},
    ),
    ("request_id", {"text": {"text": "x"}, "request_id": ""}),
    ("request_id", {"text": {"text": "x"}, "request_id": "a\r\nb"}),
    ("request_id", {"text": {"text": "x"}, "request_id": "i" * 129}),
    ("decoding.logit_bias", {"text": {"text": "x"}, "decoding": {"logit_bias": [{"bias": 1.0}]}}),
    ("cache.cache_salt", {"text": {"text": "x"}, "cache": {"cache_salt": "é" * 129}}),
]


@pytest.mark.parametrize(("field", "fields"), BAD_REQUESTS)
def test_a_bad_request_is_named(shared: Service, field, fields):
    error = _refusal(shared, pb.GenerateRequest(**fields))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["jaxserve-field"] == field


def test_a_request_id_in_use_is_refused(service: Service):
    service.executor.step_s = 0.005
    call = service.client.generate("x", max_tokens=400, request_id="twin")
    next(iter(call))
    with pytest.raises(InvalidRequest) as refusal:
        list(service.client.generate("x", request_id="twin"))
    assert refusal.value.field == "request_id"
    call.cancel()
    service.assert_idle()
    assert list(service.client.generate("x", max_tokens=1, request_id="twin"))


FULL_REQUEST = convert.generate_request(
    "some text",
    request_id="abc",
    cache_salt="salt",
    temperature=0.5,
    top_p=0.9,
    logit_bias={1: 1.0},
    allowed_token_ids=[1, 2, 3],
    bad_token_ids=[3],
    stop=["zz"],
    stop_token_ids=[9],
    max_tokens=2,
    logprobs=1,
)

UNKNOWN = b"\xf8\x3f\x01"  # Field number 1023, varint 1.


def test_unknown_fields_are_refused_at_every_depth(shared: Service):
    known = pb.GenerateRequest(text=pb.TextPrompt(text="x")).SerializeToString()
    sampling = b"\x2a\x03" + UNKNOWN  # Field 5, three bytes long.
    bias = b"\x32\x05\x22\x03" + UNKNOWN  # Field 6, its field 4.
    for path, extra in (
        ("request", UNKNOWN),
        ("sampling", sampling),
        ("decoding.logit_bias", bias),
    ):
        error = _refusal(shared, known + extra)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, path
        assert dict(error.trailing_metadata())["jaxserve-field"] == path
    with grpc.insecure_channel(shared.address) as channel:
        for method in ("Inference/Tokenize", "Inference/Abort", "Control/GetLoad"):
            with pytest.raises(grpc.RpcError) as refusal:
                channel.unary_unary(f"/jaxserve.v1.{method}")(b"\x0a\x00" * 0 + UNKNOWN)
            assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT, method


def test_tokenize_refuses_what_generate_refuses(shared: Service):
    for prompt in ("x" * ((64 << 10) + 1), [{"role": "pirate", "content": "ahoy"}]):
        with pytest.raises(InvalidRequest):
            shared.client.tokenize(prompt)


@pytest.mark.parametrize("data", [b"\x12\xff\xff", b"\x12\x03\x0a\x01\xff", b"\x00"])
def test_bytes_that_are_no_message_are_refused(shared: Service, data):
    error = _refusal(shared, data)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert dict(error.trailing_metadata())["jaxserve-field"] == "request"
    with grpc.insecure_channel(shared.address) as channel, pytest.raises(grpc.RpcError) as refusal:
        channel.unary_unary("/jaxserve.v1.Inference/Tokenize")(b"\x0a\xff")
    assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT


@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_mutated_requests_never_break_the_server(shared: Service, data):
    """Flipped, cut and inserted bytes give an answer or a clean refusal."""
    raw = bytearray(FULL_REQUEST.SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        index = data.draw(st.integers(0, len(raw) - 1))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
        if kind == "flip":
            raw[index] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut" and len(raw) > 1:
            del raw[index]
        else:
            raw.insert(index, data.draw(st.integers(0, 255)))
    with grpc.insecure_channel(shared.address) as channel:
        call = channel.unary_stream("/jaxserve.v1.Inference/Generate")(bytes(raw))
        with contextlib.suppress(grpc.RpcError):
            list(call)
    assert call.code() in (grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT), call.details()
    assert not shared.engine.snapshot().failed


def test_a_message_above_4_mib_is_refused_quickly(shared: Service):
    request = pb.GenerateRequest(text=pb.TextPrompt(text="x" * (4 << 20)))
    start_s = time.process_time()  # Of the server, too, and a busy machine does not stretch it.
    error = _refusal(shared, request)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert time.process_time() - start_s < 1.0


def test_metadata_above_its_limit_is_refused(shared: Service):
    with grpc.insecure_channel(shared.address) as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        with pytest.raises(grpc.RpcError) as refusal:
            stub.Abort(pb.AbortRequest(request_id="x"), metadata=[("big", "m" * (9 << 10))])
    assert refusal.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert shared.client.is_serving()


def test_neither_prompt_nor_output_is_logged(service: Service, caplog):
    caplog.set_level(logging.DEBUG)
    canary = "canary-4711"
    text = "".join(output.text for output in service.client.generate(canary, max_tokens=30))
    for bad in ({"max_tokens": 0}, {"stop": [""]}):
        with pytest.raises(InvalidRequest):
            list(service.client.generate(canary, **bad))
    with pytest.raises(InvalidRequest):
        service.client.tokenize([{"role": "pirate", "content": canary}])
    assert canary not in caplog.text
    assert text[:12] not in caplog.text


def _refusal(service: Service, request: pb.GenerateRequest | bytes) -> grpc.RpcError:
    data = request if isinstance(request, bytes) else request.SerializeToString()
    with grpc.insecure_channel(service.address) as channel:
        method = channel.unary_stream("/jaxserve.v1.Inference/Generate")
        with pytest.raises(grpc.RpcError) as refusal:
            list(method(data))
    return refusal.value
