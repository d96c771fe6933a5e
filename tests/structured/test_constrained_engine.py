"""Constraints through a real engine: every kind, alone, in company, and after preemptions."""

from __future__ import annotations

import json
import re

import pytest

from jaxserve.engine.grammar.masks import RequestMasks
from jaxserve.engine.offline import complete_in_order
from jaxserve.engine.request import FinishReason, GenerationRequest
from jaxserve.engine.sampling_json import sampling_from_json
from jaxserve.errors import InvalidRequest

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def is_person(text: str) -> bool:
    person = json.loads(text)
    return (
        list(person) == ["name", "age", "tags"]
        and len(person["name"]) <= 8
        and 0 <= person["age"] <= 150
        and set(person["tags"]) <= {"a", "b"}
    )


CHOICES = ["left", "right", 'a "third"\nway']
KINDS = {
    "json_schema": (SCHEMA, is_person),
    "json_object": (True, lambda text: isinstance(json.loads(text), dict)),
    "regex": ("[ab]{2,5}(x|yz)", lambda text: re.fullmatch("[ab]{2,5}(x|yz)", text)),
    "choice": (CHOICES, CHOICES.__contains__),
    "grammar": ('start: "<" WORD ("," WORD)* ">"\nWORD: /[a-z]{1,3}/',
                lambda text: re.fullmatch(r"<[a-z]{1,3}(,[a-z]{1,3})*>", text)),
}  # fmt: skip


def request(name: str, constraint: object, prompt: bytes = b"Say: ", **sampling: object):
    settings = {"temperature": 0.0, "seed": 1, "max_tokens": 150, "constraint": constraint}
    return GenerationRequest(name, tuple(prompt), sampling_from_json(settings | sampling))


def run(running, requests, ahead: int = 32):
    return list(complete_in_order(running.engine, requests, max_ahead=ahead))


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_greedy_and_sampled(running, kind):
    value, is_right = KINDS[kind]
    requests = [
        request(f"{kind}{seed}", {kind: value}, temperature=temperature, seed=seed)
        for seed, temperature in enumerate((0.0, 0.7, 1.0, 1.5, 5.0))
    ]
    texts = []
    for done in run(running, requests):
        if done.finish_reason is FinishReason.STOP:
            assert is_right(done.text), done.text
            texts.append(done.text)
    # The eos shows in the ids only.
    assert texts


def mixed(prefix: str) -> list[GenerationRequest]:
    """Of many kinds and lengths, more than there are pages for, some of them free."""
    made = []
    for index in range(10):
        prompt = bytes(65 + (index * 7 + i) % 26 for i in range(20 + 37 * (index % 5)))
        constraint = None if index % 3 == 0 else {"json_schema": SCHEMA}
        if index % 5 == 1:
            constraint = {"regex": "([a-f]{4} ){20,30}!"}
        made.append(
            request(
                f"{prefix}{index}",
                constraint,
                prompt,
                temperature=(0.0, 0.9)[index % 2],
                top_p=(1.0, 0.9)[index % 4 == 3],
                repetition_penalty=(1.0, 1.2)[index % 3 == 1],
                seed=index,
                max_tokens=64,
                logprobs=2 if index % 2 else None,
            )
        )
    return made


def test_company_and_preemption_change_no_bit(running):
    alone = run(running, mixed("alone"), 1)
    before = running.engine.snapshot().num_preemptions
    together = run(running, mixed("together"), 10)
    assert running.engine.snapshot().num_preemptions > before
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert one.finish_reason is other.finish_reason
    assert running.engine.snapshot().compiles_after_ready == 0


def test_max_tokens_and_stop_strings_cut_it_short(running):
    constraint = {"regex": "[ab]{50}"}
    cut, stopped = run(
        running,
        [
            request("cut", constraint, max_tokens=10),
            request("stopped", constraint, temperature=1.0, stop=["aab", "bba", "abab"]),
        ],
    )
    assert (cut.finish_reason, len(cut.token_ids)) == (FinishReason.LENGTH, 10)
    assert stopped.finish_reason is FinishReason.STOP
    assert stopped.stop_match in ("aab", "bba", "abab")


def test_a_bias_cannot_break_out(running):
    bias = {str(ord("z")): 100.0}
    [done] = run(running, [request("biased", {"choice": ["yes", "no"]}, logit_bias=bias)])
    assert done.text in ("yes", "no")


@pytest.mark.parametrize(
    ("field", "value"),
    [("ignore_eos", True), ("min_tokens", 3), ("allowed_token_ids", [1]), ("bad_token_ids", [1])],
)
def test_settings_that_contradict_it_are_refused_by_name(running, field, value):
    with pytest.raises(InvalidRequest, match="constraint") as refusal:
        running.engine.validate(request("r", {"choice": ["x"]}, **{field: value}))
    assert refusal.value.field == field


@pytest.mark.parametrize(
    ("constraint", "field"),
    [
        ({}, "constraint"),
        ({"regex": "a", "choice": ["a"]}, "constraint"),
        ("a", "constraint"),
        ({"xml": "a"}, "constraint.xml"),
        ({"regex": 5}, "constraint.regex"),
        ({"json_object": False}, "constraint.json_object"),
        ({"choice": "yes"}, "constraint.choice"),
        ({"choice": []}, "constraint.choice"),
        ({"json_schema": []}, "constraint.json_schema"),
        ({"regex": "\ud800"}, "constraint.regex"),
    ],
)
def test_what_is_no_constraint_is_refused_by_name(running, constraint, field):
    with pytest.raises(InvalidRequest) as refusal:
        running.engine.validate(request("r", constraint))
    assert refusal.value.field == field


def test_a_grammar_that_gets_stuck_ends_its_own_request_alone(running, monkeypatch):
    advance = RequestMasks.advance

    def stuck_after_three(masks, token_id, compiler):
        advance(masks, token_id, compiler)
        if masks.words_of == "stuck" and masks.index == 3:
            raise RuntimeError("planted")

    # A mark that survives the slots of the class.
    monkeypatch.setattr(RequestMasks, "words_of", "", raising=False)
    monkeypatch.setattr(RequestMasks, "advance", stuck_after_three)
    record = running.engine._record

    def marked(generation):
        made = record(generation)
        if made.masks is not None and generation.request_id == "stuck":
            made.masks.words_of = "stuck"
        return made

    monkeypatch.setattr(running.engine, "_record", marked)
    stuck, other = run(
        running,
        [request("stuck", {"regex": "a{20}"}), request("other", {"regex": "a{20}"})],
    )
    assert stuck.finish_reason is FinishReason.ERROR
    assert (other.finish_reason, other.text) == (FinishReason.STOP, "a" * 20)
