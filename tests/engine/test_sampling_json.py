from __future__ import annotations

from dataclasses import fields, replace

import pytest

from jaxserve.engine.grammar.constraint import Constraint, ConstraintKind
from jaxserve.engine.sampling_json import SAMPLING_FIELDS, sampling_from_json
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import InvalidRequest

EXAMPLES = {
    "temperature": 0.5,
    "top_k": 4,
    "top_p": 0.9,
    "min_p": 0.1,
    "seed": 2**64 - 1,
    "repetition_penalty": 1.1,
    "presence_penalty": -1.0,
    "frequency_penalty": 2,
    "logit_bias": {"7": -1.5, "8": 2},
    "allowed_token_ids": [1, 2],
    "bad_token_ids": [3],
    "max_tokens": 9,
    "min_tokens": 1,
    "stop": ["a", "b"],
    "stop_token_ids": [5],
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "logprobs": 3,
    "prompt_logprobs": 0,
    "constraint": {"choice": ["a", "b"]},
}


def test_every_field_is_understood() -> None:
    assert EXAMPLES.keys() == SAMPLING_FIELDS
    params = sampling_from_json(EXAMPLES)
    assert params.constraint == Constraint(ConstraintKind.CHOICE, choices=("a", "b"))
    # It contradicts some of the others.
    replace(params, constraint=None).validate(vocab_size=100)
    for field in fields(SamplingParams):
        value, example = getattr(params, field.name), EXAMPLES[field.name]
        assert value != field.default
        if isinstance(example, list):
            assert value == tuple(example)
        elif not isinstance(example, dict):
            assert value == example
    assert params.logit_bias == ((7, -1.5), (8, 2.0))
    assert sampling_from_json({"logit_bias": [[7, -1.5]]}).logit_bias == ((7, -1.5),)
    assert sampling_from_json({"stop": "x"}).stop == ("x",)


def test_null_is_absent() -> None:
    assert sampling_from_json(dict.fromkeys(EXAMPLES)) == SamplingParams()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, "text") for name in EXAMPLES if name not in ("stop",)),
        ("top_k", 1.0),
        ("seed", True),
        ("temperature", True),
        ("temperature", 10**400),
        ("ignore_eos", 1),
        ("stop", [1]),
        ("stop", {"a": 1}),
        ("stop_token_ids", [True]),
        ("logit_bias", {"1_0": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", [[1]]),
        ("temprature", 1.0),
    ],
)
def test_a_wrong_type_or_name_is_refused_by_field(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        sampling_from_json({field: value})
    assert caught.value.field == field
