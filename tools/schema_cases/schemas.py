"""JSON schemas of many kinds, made from a seed, and unsupported ones."""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]

WORDS = ("alpha", "beta", "gamma", "delta", "x", "y_1", "naïve", "日本")
PATTERNS = ("^[a-z]{1,6}$", "^(ab|cd)+e?$", "^[A-Z]{2}[0-9]{3}$", "^\\d{1,4}(\\.\\d)?$")
FORMATS = ("date", "ipv4", "uuid", "email")

UNSUPPORTED: dict[str, Schema] = {
    "uniqueItems": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
    "not": {"not": {"type": "string"}},
    "if": {"if": {"type": "string"}, "then": {"maxLength": 3}},
    "contains": {"type": "array", "contains": {"const": 1}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "regex": {"type": "string", "format": "regex"},
    "x-guidance": {"type": "string", "x-guidance": {"lenient": True}},
}
"""What the refusal names -> a schema that is refused for it."""


def make_schema(seed: int) -> Schema:
    """One schema; most are objects, as those that programs send are."""
    rng = random.Random(seed)  # noqa: S311
    if rng.random() < 0.1:
        return _recursive(rng)
    if rng.random() < 0.2:
        return _any(rng, 2)
    return _object(rng, 2)


def _any(rng: random.Random, depth: int) -> Schema:
    index = rng.randrange(len(_PLAIN) + (len(_NESTED) if depth else 0))
    if index < len(_PLAIN):
        return _PLAIN[index](rng)
    return _NESTED[index - len(_PLAIN)](rng, depth - 1)


def _string(rng: random.Random) -> Schema:
    match rng.randrange(4):
        case 0:
            return {"type": "string", "pattern": rng.choice(PATTERNS)}
        case 1:
            return {"type": "string", "format": rng.choice(FORMATS)}
        case 2:
            return {"type": "string", "minLength": rng.randrange(3), "maxLength": 4}
        case _:
            return {"type": "string", "maxLength": rng.randint(0, 12)}


def _integer(rng: random.Random) -> Schema:
    low = rng.randint(-50, 50)
    high = low + rng.randint(0, 200)
    match rng.randrange(4):
        case 0:
            return {"type": "integer", "minimum": low, "maximum": high}
        case 1:
            return {"type": "integer", "exclusiveMinimum": low - 1, "exclusiveMaximum": high + 1}
        case 2:
            return {"type": "integer", "multipleOf": rng.choice((2, 5, 10)), "minimum": 0,
                    "maximum": 1000}  # fmt: skip
        case _:
            return {"type": "integer", "minimum": low}


def _number(rng: random.Random) -> Schema:
    low = rng.randint(-10, 10)
    if rng.random() < 0.5:
        return {"type": "number", "minimum": low, "maximum": low + 5.5}
    return {"type": "number"}


def _enum(rng: random.Random) -> Schema:
    values: list[Any] = [*rng.sample(WORDS, 3), 7, -1.5, None, True, {"k": [1]}, []]
    return {"enum": rng.sample(values, rng.randint(1, 5))}


def _const(rng: random.Random) -> Schema:
    return {"const": rng.choice(['a "quoted" \\ word', 0, False, None, [1, "z"], {"p": {"q": 2}}])}


def _simple(rng: random.Random) -> Schema:
    return {"type": rng.choice(("boolean", "null"))}


def _types(rng: random.Random) -> Schema:
    return {"type": rng.sample(("boolean", "null", "integer"), 2), "description": "of two types"}


def _one_of(rng: random.Random) -> Schema:
    first, second = rng.sample(WORDS, 2)
    return {"oneOf": [{"const": first}, {"const": second}, {"type": "integer", "minimum": 3}]}


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, rng.randint(1, 4))
    required = [name for name in names if rng.random() < 0.7]
    return {
        "type": "object",
        "title": "generated",
        "properties": {name: _any(rng, depth) for name in names},
        "required": required,
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> Schema:
    least = rng.randrange(3)
    most = least + rng.randrange(3)
    return {"type": "array", "items": _any(rng, depth), "minItems": least, "maxItems": most}


def _tuple(rng: random.Random, depth: int) -> Schema:
    parts = [_any(rng, depth) for _ in range(rng.randint(1, 3))]
    return {"type": "array", "prefixItems": parts, "items": False, "minItems": len(parts)}


def _map(rng: random.Random, depth: int) -> Schema:
    return {
        "type": "object",
        "patternProperties": {"^[a-c]{1,2}$": _any(rng, depth)},
        "additionalProperties": False,
        "maxProperties": rng.randint(1, 3),
    }


def _any_of(rng: random.Random, depth: int) -> Schema:
    return {"anyOf": [_any(rng, depth) for _ in range(rng.randint(2, 3))]}


def _all_of(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(WORDS, 2)
    return {
        "allOf": [
            {"type": "object", "properties": {name: _any(rng, depth)}, "required": [name]}
            for name in names
        ],
        "properties": dict.fromkeys(names, True),
        "additionalProperties": False,
    }


def _recursive(rng: random.Random) -> Schema:
    return {
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": _any(rng, 0),
                    "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]},
                },
                "required": ["value", "next"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/node",
    }


_PLAIN = (_string, _integer, _number, _enum, _const, _simple, _types, _one_of)
_NESTED = (_object, _array, _any_of, _all_of, _map, _tuple)
