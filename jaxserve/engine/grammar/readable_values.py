"""What JSON Schema allows and readers refuse: days that do not exist, mail addresses longer than
mail takes, whole numbers that no machine word holds.

The library's expressions have the year 0000, February 29 in every year and the second 60. Readers
refuse these, Python's and the reference validator among them; RFC 3339 has the last two only where
the calendar or the earth's rotation does. Its mail addresses and host names have no longest
length, and its integers no largest one: there a small model goes on and on.
"""

from __future__ import annotations

from typing import Any

_YEAR = "(?:[1-9][0-9]{3}|0[1-9][0-9]{2}|00[1-9][0-9]|000[1-9])"
_FOURTH = "(?:0[48]|[2468][048]|[13579][26])"
"""Numbers of two digits, but 00, that 4 divides."""
_LEAP_YEAR = f"(?:[0-9]{{2}}{_FOURTH}|{_FOURTH}00)"
_DAY = f"(?:{_YEAR}-(?:0[13-9]|1[0-2]|02-(?:[01][0-9]|2[0-8]))|{_LEAP_YEAR}-02-29)"
_TIME = "[0-9]{2}:[0-9]{2}:[0-5]"

PATTERNS = {
    "date": f"^{_DAY}",
    "date-time": f"^{_DAY}(?:-[0-9]{{2}})?[Tt]{_TIME}",
    "time": f"^{_TIME}",
    "email": "^[^@]{1,64}@[^@]{1,253}$",  # RFC 5321, 4.5.3.1; a name of DNS.
    "hostname": "^.{1,253}$",
}
"""Format -> what its texts must also match."""

MAX_INTEGER = 2**63 - 1024
"""Of integers without a bound of their own: the largest of 64 bits that the library, which reads
bounds as floats, has exactly."""

_VALUES = frozenset({"const", "enum", "default", "examples"})
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def with_readable_values(schema: Any) -> Any:
    """A decoded schema that takes only values which readers take, in the same order. What is meant
    by values in it, not by schemas, stays. A schema with a number beyond `MAX_INTEGER` anywhere
    asks for large numbers, so that its integers stay, too."""
    return _narrowed(schema, bounds_integers=not _has_large_number(schema))


def _narrowed(schema: Any, *, bounds_integers: bool) -> Any:
    if isinstance(schema, list):
        return [_narrowed(one, bounds_integers=bounds_integers) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _VALUES:
            result[key] = value
        elif key in _MAPS and isinstance(value, dict):
            result[key] = {
                name: _narrowed(one, bounds_integers=bounds_integers) for name, one in value.items()
            }
        else:
            result[key] = _narrowed(value, bounds_integers=bounds_integers)
    if bounds_integers:
        result |= _integer_bounds(schema)
    return _with_pattern(result)


def _with_pattern(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("format")
    pattern = PATTERNS.get(name) if isinstance(name, str) else None
    if pattern is None:
        return schema
    if "pattern" not in schema:
        return schema | {"pattern": pattern}
    others = schema.get("allOf", [])
    return schema | {"allOf": [*(others if isinstance(others, list) else []), {"pattern": pattern}]}


def _integer_bounds(schema: dict[str, Any]) -> dict[str, Any]:
    types = schema.get("type")
    types = types if isinstance(types, list) else [types]
    # Bounds beside `multipleOf` can be more than the library counts out.
    if "integer" not in types or "number" in types or "multipleOf" in schema:
        return {}
    bounds: dict[str, Any] = {}
    if "minimum" not in schema and "exclusiveMinimum" not in schema:
        bounds["minimum"] = -MAX_INTEGER
    if "maximum" not in schema and "exclusiveMaximum" not in schema:
        bounds["maximum"] = MAX_INTEGER
    return bounds


def _has_large_number(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_has_large_number, value.values()))
    if isinstance(value, list):
        return any(map(_has_large_number, value))
    return isinstance(value, int | float) and abs(value) > MAX_INTEGER
