"""Dates that exist: what JSON Schema's formats of days and times must say beyond the library's own.

The library's expressions have the year 0000, February 29 in every year and the second 60. Readers
refuse these, Python's and the reference validator among them; RFC 3339 has the last two only where
the calendar or the earth's rotation does.
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
}
"""Format -> what its texts must also begin with."""

_VALUES = frozenset({"const", "enum", "default", "examples"})
_MAPS = frozenset({"properties", "patternProperties", "$defs", "definitions", "dependentSchemas"})


def with_real_dates(schema: Any) -> Any:
    """A decoded schema that takes only dates and times that exist, in the same order. What the
    schema means by values, not by schemas, stays."""
    if isinstance(schema, list):
        return [with_real_dates(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    result: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _VALUES:
            result[key] = value
        elif key in _MAPS and isinstance(value, dict):
            result[key] = {name: with_real_dates(one) for name, one in value.items()}
        else:
            result[key] = with_real_dates(value)
    name = schema.get("format")
    pattern = PATTERNS.get(name) if isinstance(name, str) else None
    if pattern is None:
        return result
    if "pattern" not in result:
        return result | {"pattern": pattern}
    others = result.get("allOf", [])
    return result | {"allOf": [*(others if isinstance(others, list) else []), {"pattern": pattern}]}
