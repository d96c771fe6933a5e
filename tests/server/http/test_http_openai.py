"""The official openai client gets what the script says, whole and as streams."""

from __future__ import annotations

import json
import math

import openai
import pytest

from tests.server.http.raw_http import ask, post
from tests.server.scripted_service import text_from

HI = [{"role": "user", "content": "hi"}]
HI_TEXT = "<user>hi<assistant>"


def test_models(client, service):
    [model] = client.models.list().data
    assert (model.id, model.owned_by, model.max_model_len) == ("script", "jaxserve", 512)
    assert client.models.retrieve("script") == model
    with pytest.raises(openai.NotFoundError, match="script is"):
        client.models.retrieve("another")


def test_completion(client, service):
    reply = client.completions.create(model="script", prompt="hello", max_tokens=30)
    assert (reply.object, reply.model, reply.system_fingerprint) == (
        "text_completion",
        "script",
        "scripted@7",
    )
    [choice] = reply.choices
    assert (choice.text, choice.finish_reason) == (text_from(5, 30), "length")
    assert choice.logprobs is None
    usage = reply.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (5, 30, 35)
    service.assert_idle()


def test_a_completion_has_16_tokens_unless_told_and_a_chat_has_no_limit(client, service):
    assert len(client.completions.create(model="script", prompt="x").choices[0].text) == 16
    chat = client.chat.completions.create(model="script", messages=HI)
    assert len(chat.choices[0].message.content) == 512 - len(HI_TEXT)


def test_several_prompts_of_any_kind(client, service):
    ids = service.client.tokenize("four")
    for prompt in (["one", "three"], [ids, ids[:2]], ids):
        prompts = prompt if isinstance(prompt[0], str | list) else [prompt]
        reply = client.completions.create(model="script", prompt=prompt, max_tokens=8, n=2)
        lengths = [len(one) for one in prompts for _ in range(2)]
        assert [choice.index for choice in reply.choices] == list(range(len(lengths)))
        assert [choice.text for choice in reply.choices] == [text_from(n, 8) for n in lengths]
        assert reply.usage.prompt_tokens == sum(len(one) for one in prompts)
        assert reply.usage.completion_tokens == 8 * len(lengths)


def test_chat(client, service):
    reply = client.chat.completions.create(model="script", messages=HI, max_completion_tokens=12)
    [choice] = reply.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == text_from(len(HI_TEXT), 12)
    assert choice.finish_reason == "length"
    assert reply.usage.prompt_tokens == len(HI_TEXT)
    assert reply.object == "chat.completion"


def test_a_message_in_parts_is_the_same_message(client, service):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    whole = client.chat.completions.create(model="script", messages=HI, max_tokens=5)
    split = client.chat.completions.create(
        model="script", messages=[{"role": "user", "content": parts}], max_tokens=5
    )
    assert split.usage.prompt_tokens == whole.usage.prompt_tokens
    assert split.choices[0].message.content == whole.choices[0].message.content


def test_chat_stream(client, service):
    chunks = list(
        client.chat.completions.create(
            model="script",
            messages=HI,
            max_tokens=40,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert len({chunk.id for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [len(chunk.choices) for chunk in chunks[:-1]] == [1] * (len(chunks) - 1)
    content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert content == text_from(len(HI_TEXT), 40)
    reasons = [chunk.choices[0].finish_reason for chunk in chunks[:-1]]
    assert reasons == [None] * (len(chunks) - 2) + ["length"]
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 40
    assert chunks[-1].usage.total_tokens == 40 + len(HI_TEXT)
    service.assert_idle()


def test_completion_stream_of_several_choices(client, service):
    texts = ["", "", ""]
    ends = {}
    stream = client.completions.create(model="script", prompt="abc", n=3, max_tokens=9, stream=True)
    for chunk in stream:
        assert chunk.usage is None
        [choice] = chunk.choices
        texts[choice.index] += choice.text
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert texts == [text_from(3, 9)] * 3
    assert ends == dict.fromkeys(range(3), "length")


def test_a_stream_is_events_of_json_up_to_done(service):
    body = {"prompt": "x", "max_tokens": 3, "stream": True}
    status, headers, text = post(service, "/v1/completions", body)
    assert status == 200
    assert headers["content-type"] == "text/event-stream; charset=utf-8"
    assert headers["cache-control"] == "no-store"
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith('data: {"') for event in events[:-2])
    assert "usage" not in text


def test_usage_in_every_chunk_counts_up(client, service):
    chunks = list(
        client.completions.create(
            model="script",
            prompt="xy",
            max_tokens=20,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"stream_options": {"continuous_usage_stats": True, "include_usage": True}},
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-1] == 20
    assert {chunk.usage.prompt_tokens for chunk in chunks} == {2}


def test_stop_strings_and_stop_tokens(client, service):
    create = client.completions.create
    whole = create(model="script", prompt="x", stop="fox", max_tokens=60).choices[0]
    assert (whole.text, whole.finish_reason, whole.stop_reason) == (
        "he quick brown ",
        "stop",
        "fox",
    )
    stream = create(model="script", prompt="x", stop=["q", "fox"], max_tokens=60, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == "he "
    semicolon = service.client.tokenize(";")[0]
    kept = {"stop_token_ids": [semicolon], "include_stop_str_in_output": True}
    ended = create(model="script", prompt="x", max_tokens=60, extra_body=kept).choices[0]
    assert (ended.text[-1], ended.stop_reason) == (";", semicolon)


def test_logprobs_of_a_completion(client, service):
    create = client.completions.create
    whole = create(model="script", prompt="x", max_tokens=6, logprobs=3).choices[0]
    found = whole.logprobs
    assert "".join(found.tokens) == whole.text == text_from(1, 6)
    assert found.text_offset == list(range(6))
    assert found.token_logprobs == [-0.5] * 6
    assert all(len(top) == 4 and top[token] == -0.5 for top, token in
               zip(found.top_logprobs, found.tokens, strict=True))  # fmt: skip
    parts = [
        chunk.choices[0].logprobs
        for chunk in create(model="script", prompt="x", max_tokens=6, logprobs=3, stream=True)
    ]
    assert [token for part in parts for token in part.tokens] == found.tokens
    assert [offset for part in parts for offset in part.text_offset] == found.text_offset


def test_logprobs_of_a_chat(client, service):
    create = client.chat.completions.create
    asked = {"model": "script", "messages": HI, "max_tokens": 5, "logprobs": True}
    content = create(**asked, top_logprobs=2).choices[0].logprobs.content
    assert "".join(entry.token for entry in content) == text_from(len(HI_TEXT), 5)
    assert all(bytes(entry.bytes).decode() == entry.token for entry in content)
    assert all(entry.logprob == -0.5 and len(entry.top_logprobs) == 2 for entry in content)
    assert create(**asked).choices[0].logprobs.content[0].top_logprobs == []
    assert create(model="script", messages=HI, max_tokens=5).choices[0].logprobs is None
    streamed = [
        entry
        for chunk in create(**asked, top_logprobs=2, stream=True)
        if chunk.choices[0].logprobs
        for entry in chunk.choices[0].logprobs.content
    ]
    assert streamed == content


def test_settings_reach_the_sampler(client, service):
    settings = {
        "temperature": 0.25, "top_p": 0.5, "seed": 2**64 - 1, "presence_penalty": 0.5,
        "frequency_penalty": -0.5, "logit_bias": {"7": -3.5}, "stop": ["zz"],
    }  # fmt: skip
    beyond = {
        "top_k": 9, "min_p": 0.125, "repetition_penalty": 1.25, "min_tokens": 2,
        "bad_token_ids": [3], "stop_token_ids": [4], "ignore_eos": True,
        "skip_special_tokens": False, "cache_salt": "mine",
    }  # fmt: skip
    client.chat.completions.create(
        model="script", messages=HI, n=2, max_tokens=3, user="u", **settings, extra_body=beyond
    )
    loads = [load for plan in service.executor.plans for load in plan.slot_loads]
    assert [load.sampling.seed for load in loads] == [2**64 - 1, 0]
    for load in loads:
        sampling = load.sampling
        assert sampling.logit_bias == ((7, -3.5),)
        assert (sampling.max_tokens, sampling.stop, sampling.bad_token_ids) == (3, ("zz",), (3,))
        names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
        assert {name: getattr(sampling, name) for name in names}.items() <= settings.items()
        names = ("top_k", "min_p", "repetition_penalty", "min_tokens", "ignore_eos")
        assert {name: getattr(sampling, name) for name in names}.items() <= beyond.items()
        assert not math.isnan(sampling.temperature)


def test_null_is_absent(service):
    names = ("model", "temperature", "stop", "logit_bias", "n", "stream", "seed", "logprobs")
    body = {"prompt": "x", "max_tokens": 2} | dict.fromkeys(names)
    assert post(service, "/v1/completions", body)[0] == 200


def test_token_ids_are_told_when_asked_for(client, service):
    ids = {"return_token_ids": True}
    reply = client.completions.create(model="script", prompt="x", max_tokens=7, extra_body=ids)
    assert reply.choices[0].token_ids == service.client.tokenize(reply.choices[0].text)
    stream = client.chat.completions.create(
        model="script", messages=HI, max_tokens=7, stream=True, extra_body=ids
    )
    streamed = [i for chunk in stream for i in getattr(chunk.choices[0], "token_ids", [])]
    assert streamed == service.client.tokenize(text_from(len(HI_TEXT), 7))


def test_tokenize_and_back(service):
    ids = service.client.tokenize("héllo")
    expected = {"tokens": ids, "count": 6, "max_model_len": 512}
    assert post(service, "/tokenize", {"prompt": "héllo"})[2] == expected
    assert post(service, "/detokenize", {"tokens": ids})[2] == {"prompt": "héllo"}
    assert post(service, "/detokenize", {"tokens": []})[2] == {"prompt": ""}
    chat = post(service, "/tokenize", {"messages": HI})[2]
    assert chat["tokens"] == service.client.tokenize(HI)


def test_the_request_id_is_the_clients_or_a_new_one(service):
    body = {"prompt": "x", "max_tokens": 1}
    _, headers, reply = post(service, "/v1/completions", body, {"x-request-id": "mine"})
    assert (headers["x-request-id"], reply["id"]) == ("mine", "cmpl-mine")
    made = {post(service, "/v1/completions", body)[1]["x-request-id"] for _ in range(2)}
    assert len(made) == 2


def test_version_and_unknown_paths(service):
    assert ask(service, "GET", "/version")[2]["version"]
    status, _, reply = ask(service, "GET", "/v2/models")
    assert (status, reply["error"]["code"]) == (404, "not_found")
    status, _, reply = ask(service, "GET", "/v1/completions")
    assert (status, reply["error"]["code"]) == (405, "method_not_allowed")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_load_generators_request_gives_the_tokens_it_counts(service, path):
    """The body that guidellm 0.8 sends, which wants an exact number of tokens."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"model": "script", "stream": True, "stream_options": options} | {
        "stop": None,
        "ignore_eos": True,
    }
    if "chat" in path:
        parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
        body |= {"max_completion_tokens": 21, "messages": [{"role": "user", "content": parts}]}
    else:
        body |= {"max_tokens": 21, "prompt": "one two"}
    status, _, text = post(service, path, body)
    events = [json.loads(event.removeprefix("data: ")) for event in text.split("\n\n")[:-2]]
    assert status == 200
    assert events[-1]["usage"]["completion_tokens"] == 21
    assert events[-1]["choices"] == []
