"""Values in structured output: those that readers take, and no other."""

from __future__ import annotations

import json
from datetime import date

import pytest

from jaxserve.engine.grammar.constraint import Constraint
from jaxserve.engine.grammar.readable_values import MAX_INTEGER, with_readable_values
from jaxserve.engine.grammar.terms import json_term

YEARS = (0, 1, 4, 100, 400, 1900, 2000, 2023, 2024, 2100, 9996, 9999)


def exists(text: str) -> bool:
    try:
        date.fromisoformat(text)
    except ValueError:
        return False
    return True


@pytest.fixture
def allows(running):
    def check(schema, value) -> bool:
        grammar = running.engine.grammars.compile(Constraint.json_schema(schema))
        matcher, data = grammar.matcher.deep_copy(), list(json.dumps(value).encode())
        return matcher.try_consume_tokens(data) == len(data) and matcher.is_accepting()

    return check


def test_exactly_the_days_that_exist(allows):
    schema = {"type": "string", "format": "date"}
    texts = [
        f"{year:04}-{month:02}-{day:02}"
        for year in YEARS
        for month in range(14)
        for day in (0, 1, 9, 10, 28, 29, 30, 31, 32)
    ]
    assert [text for text in texts if allows(schema, text) != exists(text)] == []


@pytest.mark.parametrize(
    ("name", "right", "wrong"),
    [
        (
            "date-time",
            ["2024-02-29T23:59:59Z", "0001-01-01t00:00:00.5-23:59"],
            ["2023-02-29T00:00:00Z", "0000-01-01T00:00:00Z", "2016-12-31T23:59:60Z", "2024-02-29"],
        ),
        ("time", ["23:59:59Z", "00:00:00.25+01:00"], ["23:59:60Z", "24:00:00Z", "00:00:00"]),
    ],
)
def test_times_that_exist(allows, name, right, wrong):
    schema = {"type": "string", "format": name}
    assert [text for text in right if not allows(schema, text)] == []
    assert [text for text in wrong if allows(schema, text)] == []


def test_other_rules_of_the_schema_stay(allows):
    schema = {"format": "date", "pattern": "^2", "allOf": [{"pattern": "5$"}]}
    assert allows(schema, "2024-02-25")
    assert not allows(schema, "1999-02-25")
    assert not allows(schema, "2024-02-24")
    assert not allows(schema, "2023-02-29")
    assert allows(schema, 5)


def test_dates_are_found_wherever_a_schema_stands(allows):
    day = {"type": "string", "format": "date"}
    schema = {
        "$defs": {"format": day},
        "properties": {"format": {"$ref": "#/$defs/format"}, "many": {"items": {"anyOf": [day]}}},
        "additionalProperties": False,
    }
    assert allows(schema, {"format": "2024-02-29", "many": ["2023-01-01"]})
    assert not allows(schema, {"format": "0000-01-01"})
    assert not allows(schema, {"many": ["2023-02-29"]})
    assert "pattern" in json_term(json.dumps(day))


def test_mail_addresses_and_hosts_have_the_lengths_of_their_protocols(allows):
    email, host = {"type": "string", "format": "email"}, {"type": "string", "format": "hostname"}
    assert allows(email, "a" * 64 + "@example.com")
    assert not allows(email, "a" * 65 + "@example.com")
    assert not allows(email, "a@" + "b." * 130 + "com")
    assert allows(host, "b." * 125 + "com")
    assert not allows(host, "b." * 126 + "com")


@pytest.mark.parametrize("types", ["integer", ["boolean", "integer"]])
def test_integers_without_a_bound_fit_64_bits(allows, types):
    schema = {"type": types}
    for value in (0, -1, MAX_INTEGER, -MAX_INTEGER):
        assert allows(schema, value)
    for value in (2**63, -(2**63) - 1, 10**40):
        assert not allows(schema, value)
    assert not allows(schema | {"minimum": 7}, 10**20)
    assert not allows(schema | {"minimum": 7}, 6)
    for large in ({"maximum": 2**70}, {"const": 2**70}, {"allOf": [{"minimum": 2.0**70}]}):
        assert with_readable_values({"type": types} | large) == {"type": types} | large
    assert allows({"type": ["integer", "number"]}, 10**40)
    assert allows({"type": "number"}, 10**40)


def test_values_are_no_schemas():
    values = {
        "const": {"format": "date"},
        "enum": [{"format": "time"}],
        "default": {"format": "date"},
    }
    assert with_readable_values(values) == values
    named = {"properties": {"format": True}, "format": ["date"]}
    assert with_readable_values(named) == named
