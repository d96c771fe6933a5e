"""What is wrong is refused by name, in OpenAI's shape, and harms nobody."""

from __future__ import annotations

import logging

import openai
import pytest

from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.server.http.schema import REFUSED_FIELDS, ChatRequest
from tests.server.http.conftest import client_of
from tests.server.http.raw_http import ask, post
from tests.server.scripted_service import start_service, wait_for

HI = [{"role": "user", "content": "hi"}]
VOCAB = 258


@pytest.fixture(scope="module")
def shared():
    """One service for the whole table: a refused request must leave no trace."""
    service = start_service()
    service.make_ready()
    yield service
    assert service.engine.metrics.num_steps == 0
    service.assert_idle()
    service.close()


SAMPLING = {
    "temperature": [-0.01, 100.1, "1", True],
    "top_p": [0, 1.001, []],
    "top_k": [-1, VOCAB + 1, 0.5],
    "min_p": [-0.1, 1.1],
    "seed": [-1, 2**64, 1.5],
    "presence_penalty": [-2.1, 2.1],
    "frequency_penalty": [-2.1, 2.1],
    "repetition_penalty": [0, 100.1],
    "logit_bias": [{"258": 1}, {"0": 101}, {"x": 1}, {"-1": 1}, [1], {"1": "1"},
                   {str(i): 0 for i in range(1025)}],
    "allowed_token_ids": [[], [VOCAB], ["1"], 5],
    "bad_token_ids": [[-1], list(range(VOCAB))],
    "stop": ["", [""], "x" * 257, ["x"] * 17, [1], 7],
    "stop_token_ids": [[VOCAB], [0] * 17],
    "constraint": [{}, "a", {"regex": "a", "choice": ["a"]}],
    "min_tokens": [-1, 600],
    "max_tokens": [0, -1, 2**31, "5"],
    "n": [0, 17, 1.5],
    "ignore_eos": [1, "true"],
    "stream": ["yes"],
    "stream_options": [{"include_usage": True}, {"more": True}],
    "cache_salt": ["x" * 257, 5],
    "user": ["x" * 513],
}  # fmt: skip
CASES = [
    *((path, field, value) for path in ("/v1/completions", "/v1/chat/completions")
      for field, values in SAMPLING.items() for value in values),
    *(("/v1/completions", "prompt", value)
      for value in ("", [], [""], [[]], [VOCAB], [-1], ["x", [1]], 5, {"a": 1}, None, [1.5],
                    "x" * 513, "x" * 65_537, [0] * 513)),
    *(("/v1/completions", "logprobs", value) for value in (-1, 21, True)),
    *(("/v1/completions", "echo", value) for value in (True, 1)),
    *(("/v1/chat/completions", "messages", value)
      for value in ([], None, "hi", [{}], [{"role": "user"}], [{"role": "", "content": "x"}],
                    [{"role": "pirate", "content": "x"}], [{"role": "user", "content": None}],
                    [{"role": "user", "content": "x", "name": "y"}],
                    [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
                    HI * 1025, [{"role": "r" * 65, "content": "x"}])),
    ("/v1/chat/completions", "logprobs", 3),
    ("/v1/chat/completions", "top_logprobs", 2),
    *(("/v1/chat/completions", "response_format", value)
      for value in ({"type": "json"}, {}, "text")),
]  # fmt: skip


@pytest.mark.parametrize(("path", "field", "value"), CASES)
def test_a_bad_field_is_named(shared, path, field, value):
    base = {"messages": HI} if "chat" in path else {"prompt": "x"}
    status, _, reply = post(shared, path, base | {field: value})
    error = reply["error"]
    assert status == 400, error
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].partition(".")[0].partition("[")[0] == field
    assert error["message"].startswith(f"{error['param']}: ")


def test_every_bound_of_the_schema_is_in_the_table():
    known = SamplingParams.__dataclass_fields__.keys() & ChatRequest.model_fields.keys()
    booleans = {"ignore_eos", "include_stop_str_in_output", "skip_special_tokens", "logprobs"}
    assert known - booleans <= SAMPLING.keys()


@pytest.mark.parametrize("field", sorted(REFUSED_FIELDS))
def test_a_field_of_other_servers_is_refused_with_advice(shared, field):
    status, _, reply = post(shared, "/v1/chat/completions", {"messages": HI, field: {"x": 1}})
    assert (status, reply["error"]["code"]) == (400, "unsupported_parameter")
    assert reply["error"]["param"].partition(".")[0] == field
    assert REFUSED_FIELDS[field] in reply["error"]["message"]


def test_an_unknown_field_is_refused(shared):
    for extra in ({"tempreature": 1}, {"x" * 10_000: 1}):
        status, _, reply = post(shared, "/v1/completions", {"prompt": "x"} | extra)
        assert (status, reply["error"]["code"]) == (400, "unknown_parameter")
        assert len(reply["error"]["message"]) < 200


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[1]", b"null", b'{"prompt": "\xff"}', b'{"prompt": "\\ud800"}',
        b'{"prompt": NaN}', b'{"prompt": "x", "temperature": NaN}',
        b'{"prompt": "x", "temperature": Infinity}', b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b"[" * 100_000, b'{"prompt":' * 50_000, b'{"prompt": ' + b"[" * 200 + b"]" * 200 + b"}",
    ],
)  # fmt: skip
def test_what_is_no_json_of_ours_is_refused(shared, body):
    status, _, reply = post(shared, "/v1/completions", body)
    assert status == 400
    assert reply["error"]["param"] in ("body", "prompt", "temperature", "seed")


def test_sizes_have_limits(shared):
    status, _, reply = post(shared, "/v1/completions", b'{"prompt": "' + b"x" * (4 << 20) + b'"}')
    assert (status, reply["error"]["code"]) == (413, "body_too_large")
    for headers in ({"x-filler": "y" * 9000}, {f"x-{i}": "y" * 40 for i in range(200)}):
        assert ask(shared, "GET", "/health", headers=headers)[0] in (400, 431)
    status = ask(shared, "GET", "/" + "a" * 9000)[0]
    assert status in (400, 431)


def test_a_body_that_is_no_json_by_its_name_is_refused(shared):
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        status, _, reply = post(shared, "/v1/completions", {"prompt": "x"}, {"content-type": kind})
        assert (status, reply["error"]["code"]) == (415, "unsupported_media_type")


def test_a_name_that_leads_here_from_a_web_page_is_refused(shared):
    status, _, reply = ask(shared, "GET", "/v1/models", headers={"host": "evil.example:8000"})
    assert (status, reply["error"]["code"]) == (403, "foreign_host")
    for host in ("localhost:1234", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
        assert ask(shared, "GET", "/v1/models", headers={"host": host})[0] == 200


def test_no_page_of_another_site_may_read_replies(shared):
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    status, found, _ = ask(shared, "OPTIONS", "/v1/completions", headers=headers)
    assert status == 405
    _, of_get, _ = ask(shared, "GET", "/v1/models", headers=headers)
    assert not any(name.startswith("access-control") for name in [*found, *of_get])


def test_a_gateways_name_can_be_allowed(make_service):
    service = make_service(server_settings={"allowed_hosts": ("Chat.example",)})
    assert ask(service, "GET", "/v1/models", headers={"host": "chat.EXAMPLE"})[0] == 200
    assert ask(service, "GET", "/v1/models", headers={"host": "evil.example"})[0] == 403


def test_another_model_is_not_found(shared):
    with client_of(shared) as client, pytest.raises(openai.NotFoundError) as refusal:
        client.chat.completions.create(model="gpt-4o", messages=HI)
    assert refusal.value.code == "model_not_found"
    assert refusal.value.param == "model"


def test_a_bad_request_id_is_refused(shared):
    status, _, reply = post(shared, "/v1/completions", {"prompt": "x"}, {"x-request-id": "a b"})
    assert (status, reply["error"]["param"]) == (400, "x-request-id")


def test_a_model_that_generates_makes_no_embeddings(shared):
    status, _, reply = post(shared, "/v1/embeddings", {"input": "x"})
    assert (status, reply["error"]["code"]) == (400, "unsupported_model")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "x", "messages": HI}, "prompt"),
        ("/tokenize", {"messages": HI, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "x" * 65_537}, "prompt"),
        ("/detokenize", {"tokens": [VOCAB]}, "tokens"),
        ("/detokenize", {"tokens": [0] * 513}, "tokens"),
        ("/detokenize", {}, "tokens"),
    ],
)
def test_tokenization_is_bounded_too(shared, path, body, param):
    status, _, reply = post(shared, path, body)
    assert (status, reply["error"]["param"]) == (400, param)


def test_a_contradiction_is_refused(shared):
    both = {"messages": HI, "max_tokens": 3, "max_completion_tokens": 4}
    assert post(shared, "/v1/chat/completions", both)[2]["error"]["param"] == "max_tokens"
    many = {"prompt": ["x"] * 9, "n": 16}
    assert post(shared, "/v1/completions", many)[2]["error"]["param"] == "n"


def test_an_id_that_runs_is_refused(service):
    service.executor.step_s = 0.01
    call = service.client.generate("x", max_tokens=400, request_id="twin")
    next(iter(call))
    status, _, reply = post(service, "/v1/completions", {"prompt": "x"}, {"x-request-id": "twin"})
    assert (status, reply["error"]["param"]) == (400, "x-request-id")
    call.cancel()


def test_a_full_queue_is_429_for_all_choices_together(service, client):
    service.executor.step_s = 0.01
    calls = [service.client.generate("o", max_tokens=400) for _ in range(4)]
    wait_for(lambda: service.engine.snapshot().num_running == 4)
    with pytest.raises(openai.RateLimitError) as refusal:
        client.completions.create(model="script", prompt="x", n=9)
    assert refusal.value.response.headers["retry-after"] == "1"
    assert refusal.value.code == "queue_full"
    wait_for(lambda: service.engine.snapshot().num_waiting == 0)
    assert service.num_streams() >= 4
    for call in calls:
        call.cancel()
    service.assert_idle()
    wait_for(lambda: service.num_streams() == 0)


def test_refusals_are_counted(make_service):
    service = make_service(ready=False)
    refused = service.server.state.num_refused
    status, headers, reply = post(service, "/v1/completions", {"prompt": "x"})
    assert (status, reply["error"]["code"]) == (503, "not_accepting")
    assert headers["retry-after"] == "1"
    service.make_ready()
    post(service, "/v1/completions", {"prompt": "x", "top_p": 9})
    post(service, "/v1/chat/completions", {"messages": HI, "tools": []})
    post(service, "/tokenize", {})
    assert {reason: count for reason, count in refused.items() if count} == {
        "not_accepting": 1,
        "invalid": 2,
    }


def test_neither_prompt_nor_output_is_logged_or_echoed(service, caplog):
    caplog.set_level(logging.DEBUG)
    canary = "canary-4711"
    bad = (
        {"prompt": canary, "max_tokens": 0},
        {"prompt": {"text": canary}},
        {"prompt": canary, "stop": [canary, 5]},
    )
    replies = [post(service, "/v1/completions", body)[2] for body in bad]
    post(service, "/v1/completions", {"prompt": canary, "max_tokens": 5})
    service.executor.fails, service.executor.failure = True, canary
    status, _, failed = post(service, "/v1/completions", {"prompt": canary})
    assert status == 500
    assert failed["error"]["message"].startswith("the server failed on this request (request id ")
    assert canary not in str(replies) + str(failed) + caplog.text
