"""Sampling settings from JSON: types are checked here, ranges by `validate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from jaxserve.engine.grammar.constraint import constraint_from_json
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.errors import InvalidRequest

SAMPLING_FIELDS = frozenset(field.name for field in fields(SamplingParams))
"""Names that `sampling_from_json` understands: those of SamplingParams."""

ANY_VOCAB_SIZE = 2**31 - 1
"""No model has more token ids, which are int32."""


def sampling_from_json(values: Mapping[str, Any]) -> SamplingParams:
    """SamplingParams of a decoded JSON object; `null` is the same as absent.

    `stop` may be one string or a list; `logit_bias` is an object
    `{"token id": bias}` or a list of `[token id, bias]`; `constraint` is an
    object with one field, such as `{"json_schema": {…}}`. Raises
    InvalidRequest naming a field that is unknown or of the wrong type.
    """
    parsed = {}
    for name, value in values.items():
        parse = _PARSERS.get(name)
        if parse is None:
            known = ", ".join(sorted(SAMPLING_FIELDS))
            raise InvalidRequest(name, f"is unknown; sampling fields are {known}")
        if value is not None:
            parsed[name] = parse(name, value)
    return SamplingParams(**parsed)


def checked_sampling(values: Mapping[str, Any]) -> SamplingParams:
    """The same, with every bound checked that holds for any vocabulary."""
    sampling = sampling_from_json(values)
    sampling.validate(vocab_size=ANY_VOCAB_SIZE)
    return sampling


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(name, f"must be a whole number, not {_kind(value)}")
    return value


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(name, f"must be a number, not {_kind(value)}")
    try:
        return float(value)
    except OverflowError:
        raise InvalidRequest(name, "is too large") from None


def _boolean(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidRequest(name, f"must be true or false, not {_kind(value)}")
    return value


def _integers(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise InvalidRequest(name, f"must be a list of token ids, not {_kind(value)}")
    return tuple(_integer(name, item) for item in value)


def _strings(name: str, value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str):
            raise InvalidRequest(name, f"must be a string or a list of strings, not {_kind(item)}")
    return tuple(values)


def _bias(name: str, value: Any) -> tuple[tuple[int, float], ...]:
    if isinstance(value, dict):
        value = [[_id_of_key(name, key), bias] for key, bias in value.items()]
    if not isinstance(value, list):
        raise InvalidRequest(name, f'must be an object {{"token id": bias}}, not {_kind(value)}')
    pairs = []
    for pair in value:
        if not isinstance(pair, list) or len(pair) != 2:
            raise InvalidRequest(name, "each entry must be [token id, bias]")
        pairs.append((_integer(name, pair[0]), _number(name, pair[1])))
    return tuple(pairs)


def _id_of_key(name: str, key: str) -> int:
    # int() would also take "1_0" and " 7".
    if not (key.isascii() and key.isdigit() and len(key) <= 10):
        raise InvalidRequest(name, f"the key {key[:20]!r} is no token id")
    return int(key)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number")


_KINDS: dict[type, str] = {
    type(None): "null",
    bool: "a boolean",
    str: "a string",
    list: "a list",
    dict: "an object",
    float: "a fraction",
}
_INTEGERS = ("top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
_BOOLEANS = ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens")
_PARSERS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(_INTEGERS, _integer),
    **dict.fromkeys(("temperature", "top_p", "min_p", *_PENALTIES), _number),
    **dict.fromkeys(_BOOLEANS, _boolean),
    **dict.fromkeys(("allowed_token_ids", "bad_token_ids", "stop_token_ids"), _integers),
    "stop": _strings,
    "logit_bias": _bias,
    "constraint": constraint_from_json,
}
