"""Constraint: the form that a request's output must have, as a plain value.

What it means is decided by `GrammarCompiler`; here are its bounds, and what needs no compiler.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from jaxserve.errors import InvalidRequest

MAX_SCHEMA_BYTES = 64 << 10
MAX_REGEX_BYTES = 4 << 10
MAX_GRAMMAR_BYTES = 64 << 10
MAX_CHOICES = 1024
MAX_CHOICE_BYTES = 64 << 10
"""Of all choices together."""
MAX_SCHEMA_DEPTH = 64
"""Objects and lists inside each other."""


class ConstraintKind(StrEnum):
    """Values are the names of the fields that clients send."""

    JSON_SCHEMA = "json_schema"
    """A JSON value that the schema in `source` accepts."""
    JSON_OBJECT = "json_object"
    """Any JSON object."""
    REGEX = "regex"
    """A text that the regular expression in `source` matches from its beginning to its end."""
    CHOICE = "choice"
    """One of `choices`."""
    GRAMMAR = "grammar"
    """A text of the context-free grammar in `source`, written as for Lark."""


@dataclass(frozen=True, slots=True)
class Constraint:
    """Hashable, so that equal ones are compiled once."""

    kind: ConstraintKind
    source: str = ""
    """JSON text of the schema, the regular expression, or the grammar."""
    choices: tuple[str, ...] = ()

    @classmethod
    def json_schema(cls, schema: Any, field: str = "constraint.json_schema") -> Constraint:
        """Of a decoded schema, whose order of properties is kept. Raises InvalidRequest naming
        `field` if it is no JSON."""
        try:
            source = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (ValueError, TypeError, RecursionError) as error:
            raise InvalidRequest(field, f"is no JSON: {error}") from None
        return cls(ConstraintKind.JSON_SCHEMA, source)

    def validate(self) -> None:
        """Raises InvalidRequest naming the field that is out of its bounds."""
        field = f"constraint.{self.kind}"
        match self.kind:
            case ConstraintKind.JSON_SCHEMA:
                _check_size(field, self.source, MAX_SCHEMA_BYTES)
                _check_schema(field, self.source)
            case ConstraintKind.REGEX:
                _check_size(field, self.source, MAX_REGEX_BYTES)
            case ConstraintKind.GRAMMAR:
                _check_size(field, self.source, MAX_GRAMMAR_BYTES)
            case ConstraintKind.CHOICE:
                if not 1 <= len(self.choices) <= MAX_CHOICES:
                    raise InvalidRequest(
                        field, f"must hold 1 to {MAX_CHOICES} texts, not {len(self.choices)}"
                    )
                if not all(self.choices):
                    raise InvalidRequest(field, "a choice must not be empty")
                _check_size(field, "".join(self.choices), MAX_CHOICE_BYTES)
            case ConstraintKind.JSON_OBJECT:
                pass


def constraint_from_json(name: str, value: Any) -> Constraint:
    """A constraint of a decoded JSON object with one field, named as a `ConstraintKind`.

    Raises InvalidRequest naming `name`, or the field in it that is wrong.
    """
    kinds = ", ".join(ConstraintKind)
    if not isinstance(value, Mapping) or len(value) != 1:
        raise InvalidRequest(name, f"must be an object with one of the fields {kinds}")
    [(key, content)] = value.items()
    if key not in ConstraintKind.__members__.values():
        raise InvalidRequest(f"{name}.{str(key)[:64]}", f"is unknown; there are {kinds}")
    kind, field = ConstraintKind(key), f"{name}.{key}"
    match kind:
        case ConstraintKind.JSON_SCHEMA:
            return Constraint.json_schema(content, field)
        case ConstraintKind.JSON_OBJECT:
            if content is not True:
                raise InvalidRequest(field, "must be true")
            return Constraint(kind)
        case ConstraintKind.CHOICE:
            if not isinstance(content, list) or not all(isinstance(c, str) for c in content):
                raise InvalidRequest(field, "must be a list of texts")
            return Constraint(kind, choices=tuple(content))
        case _:
            if not isinstance(content, str):
                raise InvalidRequest(field, "must be a text")
            return Constraint(kind, content)


def _check_size(field: str, text: str, max_bytes: int) -> None:
    if not text:
        raise InvalidRequest(field, "must not be empty")
    try:
        num_bytes = len(text.encode())
    except UnicodeEncodeError:
        raise InvalidRequest(field, "is not valid Unicode") from None
    if num_bytes > max_bytes:
        raise InvalidRequest(field, f"has {num_bytes} bytes; at most {max_bytes} are allowed")


def _check_schema(field: str, source: str) -> None:
    """What the compiler would take too long over, overlook, or be told by the schema itself."""
    try:
        schema = json.loads(source)
    except (ValueError, RecursionError):
        raise InvalidRequest(field, "is no JSON") from None
    if not isinstance(schema, dict):
        raise InvalidRequest(field, "must be an object")
    parts: list[tuple[Any, int]] = [(schema, 1)]
    while parts:
        part, depth = parts.pop()
        if depth > MAX_SCHEMA_DEPTH:
            raise InvalidRequest(field, f"is nested more than {MAX_SCHEMA_DEPTH} deep")
        if isinstance(part, dict):
            # The compiler's own switches, one of which has it ignore what it does not know.
            if "x-guidance" in part:
                raise InvalidRequest(field, "x-guidance is not supported: leave it out")
            parts += [(value, depth + 1) for value in part.values()]
        elif isinstance(part, list):
            parts += [(value, depth + 1) for value in part]
