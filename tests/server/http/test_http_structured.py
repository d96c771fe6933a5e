"""Structured output by the official client: response_format, tools, and constraints of ours."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Literal

import openai
import pytest
from pydantic import BaseModel

from tests.server.http.conftest import client_of
from tests.server.http.raw_http import post
from tests.server.scripted_service import byte_tokenizer, start_service

HI = [{"role": "user", "content": "What is the weather?"}]


class Weather(BaseModel):
    """The weather of a city."""

    city: Literal["Rome", "Oslo"]
    degrees: int


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Looks out of the window.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK = {"type": "function", "function": {"name": "get_time"}}
ROME = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Rome"}}\n</tool_call>'


@pytest.fixture(scope="module")
def shared():
    service = start_service(server_settings={"tool_call_parser": "hermes"}, max_model_len=1024)
    service.make_ready()
    yield service
    assert not service.engine.snapshot().failed
    service.assert_idle()
    service.close()


@pytest.fixture
def client(shared):
    with client_of(shared) as client:
        yield client


def chat(client, **fields):
    return client.chat.completions.create(model="script", messages=HI, **fields)


def schema_format(schema, **fields):
    return {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **fields}}


# JSON


def test_a_pydantic_model_comes_back_as_one(client, shared):
    shared.will_say('{"city": "Rome", "degrees": 7}')
    reply = client.chat.completions.parse(model="script", messages=HI, response_format=Weather)
    assert reply.choices[0].message.parsed == Weather(city="Rome", degrees=7)
    assert reply.choices[0].finish_reason == "stop"


def test_the_schema_is_kept_whatever_the_model_wants(client, shared):
    shared.will_say("I would rather talk about something else entirely.")
    form = schema_format({"type": "object", "properties": {"ok": {"type": "boolean"}},
                          "required": ["ok"], "additionalProperties": False})  # fmt: skip
    for strict in ({}, {"strict": True}, {"strict": False}):
        form["json_schema"] |= strict
        text = chat(client, response_format=form).choices[0].message.content
        assert json.loads(text)["ok"] in (True, False)


def test_a_stream_of_json_in_several_choices(client, shared):
    shared.will_say('{"city":"Oslo","degrees":-3}')
    form = schema_format(Weather.model_json_schema())
    texts = {0: "", 1: ""}
    for chunk in chat(client, response_format=form, n=2, stream=True):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
    assert {Weather.model_validate_json(text).degrees for text in texts.values()} == {-3}


def test_any_object(client, shared):
    shared.will_say('{"a": [1, {"b": null}]}')
    for form in ({"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "x"}}):
        reply = chat(client, response_format=form)
        assert json.loads(reply.choices[0].message.content) == {"a": [1, {"b": None}]}
    shared.will_say("no JSON at all")
    assert chat(client, response_format={"type": "text"}).choices[0].message.content == (
        "no JSON at all"
    )


@pytest.mark.parametrize(
    ("constraint", "said", "text"),
    [
        ({"regex": "[0-9]{3}"}, "123", "123"),
        ({"choice": ["yes", "no"]}, "no", "no"),
        ({"grammar": 'start: "a" /b+/'}, "abb", "abb"),
        ({"json_schema": {"const": "x"}}, "?", '"x"'),
        ({"json_object": True}, "{}", "{}"),
    ],
)
def test_constraints_of_ours_in_both_endpoints(client, shared, constraint, said, text):
    shared.will_say(said)
    body = {"constraint": constraint}
    assert chat(client, extra_body=body).choices[0].message.content == text
    reply = client.completions.create(model="script", prompt="x", max_tokens=50, extra_body=body)
    assert (reply.choices[0].text, reply.choices[0].finish_reason) == (text, "stop")


REFUSED = {
    "response_format.json_schema.schema": [
        {"response_format": schema_format({"type": "array", "uniqueItems": True})},
        {"response_format": schema_format({"$ref": "#"})},
        {"response_format": schema_format({"enum": ["x" * 70_000]})},
    ],
    "response_format.json_schema.name": [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "no spaces"}}}
    ],
    "response_format": [
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_object"}, "tools": [WEATHER]},
    ],
    "constraint": [
        {"constraint": {"regex": "a"}, "response_format": {"type": "json_object"}},
        {"constraint": {"regex": "a"}, "tools": [WEATHER], "tool_choice": "required"},
        {"constraint": {}},
        {"constraint": 5},
    ],
    "constraint.regex": [{"constraint": {"regex": "("}}, {"constraint": {"regex": ""}}],
    "constraint.choice": [{"constraint": {"choice": [""]}}],
    "min_tokens": [{"response_format": {"type": "json_object"}, "min_tokens": 2}],
    "tools": [{"tools": []}],
    "tool_choice": [{"tool_choice": "required"}, {"tools": [WEATHER], "tool_choice": "maybe"}],
    "parallel_tool_calls": [{"parallel_tool_calls": False}],
    "tool_choice.function.name": [
        {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}
    ],
    "tools[1].function.name": [{"tools": [CLOCK, CLOCK]}],
    "tools[0].function.name": [
        {"tools": [{"type": "function", "function": {"name": "two words"}}]}
    ],
    "tools[1].function.parameters": [
        {"tools": [CLOCK, {"type": "function", "function": {"name": "f", "parameters": bad}}],
         "tool_choice": choice}
        for bad, choice in [
            ({"type": "string"}, "auto"),
            ({}, "auto"),
            ({"type": "object", "not": {}}, "required"),
            ({"type": "object", "x-guidance": {}}, "auto"),
        ]
    ],
    "guided_json": [{"guided_json": {}}],
    "messages[0].content": [{"messages": [{"role": "assistant"}]}],
    "messages[0].tool_calls[0].function.arguments": [
        {"messages": [{"role": "assistant", "tool_calls": [
            {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}]}]}
        for arguments in ("", "[]", "{", "x")
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("field", "body"), [(field, body) for field, bodies in REFUSED.items() for body in bodies]
)
def test_refused_by_name(shared, field, body):
    status, _, reply = post(shared, "/v1/chat/completions", {"messages": HI} | body)
    assert (status, reply["error"]["param"]) == (400, field)


# Tools


def test_a_call_that_the_model_makes_by_itself(client, shared):
    shared.will_say(f"Let me see.\n{ROME}")
    [choice] = chat(client, tools=[WEATHER, CLOCK]).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me see."
    [call] = choice.message.tool_calls
    assert call.id.startswith("call_")
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Rome"}


def test_an_answer_without_a_call(client, shared):
    shared.will_say("It rains.")
    for fields in ({}, {"tool_choice": "auto"}):
        [choice] = chat(client, tools=[WEATHER], **fields).choices
        assert (choice.message.content, choice.message.tool_calls) == ("It rains.", None)
        assert choice.finish_reason == "stop"


def test_none_leaves_the_tools_out(client, shared):
    shared.will_say(ROME)
    with_tools = chat(client, tools=[WEATHER])
    without = chat(client, tools=[WEATHER], tool_choice="none")
    assert without.choices[0].message.content == ROME
    assert without.choices[0].message.tool_calls is None
    assert without.usage.prompt_tokens < with_tools.usage.prompt_tokens


def test_required_forces_a_call(client, shared):
    shared.will_say("I would rather not.")
    [choice] = chat(client, tools=[WEATHER, CLOCK], tool_choice="required").choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    for call in choice.message.tool_calls:
        assert call.function.name in ("get_weather", "get_time")
        json.loads(call.function.arguments)


def test_a_named_tool_is_called_and_no_other(client, shared):
    shared.will_say(ROME)
    named = {"type": "function", "function": {"name": "get_time"}}
    [choice] = chat(client, tools=[WEATHER, CLOCK], tool_choice=named).choices
    [call] = choice.message.tool_calls
    assert (call.function.name, call.function.arguments) == ("get_time", "{}")


def test_several_calls_unless_they_are_not_wanted(client, shared):
    shared.will_say(f"{ROME}\n{ROME}")
    required = {"tool_choice": "required"}
    single = required | {"parallel_tool_calls": False}
    for fields, count in (({}, 2), (required, 2), (single, 1)):
        [choice] = chat(client, tools=[WEATHER], **fields).choices
        assert len(choice.message.tool_calls) == count


def test_strict_keeps_free_calls_to_their_schema(client, shared):
    shared.will_say('Hm <tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}')
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}
    [choice] = chat(client, tools=[strict], max_tokens=200).choices
    assert choice.message.content == "Hm"
    assert json.loads(choice.message.tool_calls[0].function.arguments)["city"] in ("Rome", "Oslo")


def test_a_stream_of_calls(client, shared):
    shared.will_say(f"Well. {ROME}\n{ROME}")
    text, calls, reasons = "", {}, []
    for chunk in chat(client, tools=[WEATHER], stream=True):
        [choice] = chunk.choices
        text += choice.delta.content or ""
        reasons.append(choice.finish_reason)
        for delta in choice.delta.tool_calls or ():
            if delta.id is not None:
                assert delta.index not in calls
                calls[delta.index] = [delta.id, delta.function.name, ""]
            calls[delta.index][2] += delta.function.arguments
    assert text == "Well."
    assert [(name, json.loads(arguments)) for _, name, arguments in calls.values()] == [
        ("get_weather", {"city": "Rome"})
    ] * 2
    assert len({call_id for call_id, _, _ in calls.values()}) == 2
    assert reasons[-1] == "tool_calls"
    assert set(reasons[:-1]) == {None}


def test_the_client_s_own_stream_helper(client, shared):
    call = '{"name": "Weather", "arguments": {"city": "Oslo", "degrees": 5}}'
    shared.will_say(f"<tool_call>\n{call}\n</tool_call>")
    with client.chat.completions.stream(
        model="script", messages=HI, tools=[openai.pydantic_function_tool(Weather)],
    ) as stream:  # fmt: skip
        for _ in stream:
            pass
        [call] = stream.get_final_completion().choices[0].message.tool_calls
    assert call.function.parsed_arguments == Weather(city="Oslo", degrees=5)


def test_the_conversation_goes_on_after_a_call(client, shared):
    shared.will_say("Sunny.")
    call = {"id": "c1", "type": "function",
            "function": {"name": "get_weather", "arguments": '{"city": "Rome"}'}}  # fmt: skip
    messages = [
        *HI,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sun"},
    ]
    reply = client.chat.completions.create(model="script", messages=messages, tools=[WEATHER])
    assert reply.choices[0].message.content == "Sunny."
    text = byte_tokenizer().render_chat(
        [*HI, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}]},
         {"role": "tool", "content": "sun"}],
        tools=[WEATHER],
    )  # fmt: skip
    assert '<call>{"name": "get_weather", "arguments": {"city": "Rome"}}<tool>sun' in text
    assert reply.usage.prompt_tokens == len(text)


def test_a_call_that_was_cut_short(client, shared):
    shared.will_say(ROME)
    [choice] = chat(client, tools=[WEATHER], max_tokens=60).choices
    assert choice.finish_reason == "length"
    assert '{"city": "Rome"}'.startswith(choice.message.tool_calls[0].function.arguments)


def test_servers_and_models_without_tools_say_so(service, shared):
    body = {"messages": HI, "tools": [WEATHER]}
    status, _, reply = post(service, "/v1/chat/completions", body)
    assert (status, reply["error"]["param"]) == (400, "tools")
    assert "--tool-call-parser" in reply["error"]["message"]
    serving = shared.server.state.serving
    plain = byte_tokenizer()
    plain._template_source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    shared.server.state.serving = replace(serving, tokenizer=plain)
    try:
        status, _, reply = post(shared, "/v1/chat/completions", body)
    finally:
        shared.server.state.serving = serving
    assert (status, reply["error"]["param"]) == (400, "tools")
    assert "chat template" in reply["error"]["message"]
