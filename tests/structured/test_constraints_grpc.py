"""Constraints over gRPC: kept to, and refused by the field that the client wrote."""

from __future__ import annotations

import json

import pytest

from jaxserve.errors import InvalidRequest
from jaxserve.proto.v1 import inference_pb2 as pb
from jaxserve.server.convert import check_request, sampling_params
from jaxserve.server.prompt_limits import PromptLimits
from tests.server.scripted_service import ready_service


@pytest.fixture(scope="module")
def shared():
    with ready_service() as service:
        yield service


@pytest.mark.parametrize(
    ("constraint", "said"),
    [
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"a": 1}'),
        ({"json_schema": '{"const": 5}'}, "5"),
        ({"json_object": True}, "{}"),
        ({"regex": "[a-z]+!"}, "abc!"),
        ({"choice": ["one", "two"]}, "two"),
        ({"grammar": 'start: "(" start ")" | "x"'}, "((x))"),
    ],
)
def test_every_kind(shared, constraint, said):
    shared.will_say(said)
    outputs = list(shared.client.generate("hi", constraint=constraint))
    assert "".join(output.text for output in outputs) == said
    assert outputs[-1].finish_reason == "stop"


def test_the_model_is_held_to_it(shared):
    shared.will_say("anything else")
    outputs = list(shared.client.generate("hi", constraint={"json_schema": {"enum": [1, 2]}}))
    assert json.loads("".join(output.text for output in outputs)) in (1, 2)


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        ({}, "decoding.constraint"),
        ({"json_schema": "{"}, "decoding.constraint.json_schema"),
        ({"json_schema": "[]"}, "decoding.constraint.json_schema"),
        ({"json_schema": {"not": {}}}, "decoding.constraint.json_schema"),
        ({"json_object": False}, "decoding.constraint.json_object"),
        ({"regex": "("}, "decoding.constraint.regex"),
        ({"choice": []}, "decoding.constraint.choice"),
        ({"grammar": "?"}, "decoding.constraint.grammar"),
    ],
)
def test_refused_by_name(shared, constraint, field):
    with pytest.raises(InvalidRequest) as refusal:
        list(shared.client.generate("hi", constraint=constraint))
    assert refusal.value.field == field


def test_what_contradicts_it_is_refused(shared):
    with pytest.raises(InvalidRequest) as refusal:
        list(shared.client.generate("hi", constraint={"json_object": True}, min_tokens=1))
    assert refusal.value.field == "stopping.min_tokens"


def test_an_unknown_kind_is_refused():
    """One that a later version of the protocol may have."""
    request = pb.GenerateRequest(text=pb.TextPrompt(text="x"))
    request.decoding.constraint.MergeFromString(b"\x7a\x01x")
    with pytest.raises(InvalidRequest, match="does not know"):
        check_request(request, PromptLimits.of_model(258, 512))
    with pytest.raises(InvalidRequest, match="one of"):
        sampling_params(request)


def test_a_limit_in_the_middle_of_an_answer_is_named(shared):
    """The ambiguous grammar takes more of the parser with each token, until that says stop."""
    ambiguous = 'start: s\ns: "a"' + "".join(f" | {'s ' * count}" for count in range(2, 16))
    shared.will_say("a" * 500)
    num_refused = sum(shared.server.state.num_refused.values())
    answer = iter(shared.client.generate("hi", constraint={"grammar": ambiguous}))
    assert next(answer).token_ids
    with pytest.raises(InvalidRequest, match="items") as refusal:
        list(answer)
    assert refusal.value.field == "decoding.constraint"
    assert sum(shared.server.state.num_refused.values()) == num_refused
    shared.will_say("(x)")
    assert list(shared.client.generate("hi", constraint={"regex": r"\(x\)"}))
