"""Constraints made to hurt: refused, or compiled and followed within bounds of time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from jaxserve.engine.grammar.constraint import Constraint, constraint_from_json
from jaxserve.errors import InvalidRequest


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema}
    return schema


def all_of_any_of(count: int) -> dict[str, Any]:
    return {
        "allOf": [
            {
                "anyOf": [
                    {"properties": {f"a{i}{j}": {"type": "integer"}}, "required": [f"a{i}{j}"]}
                    for j in range(3)
                ]
            }
            for i in range(count)
        ]
    }


def doubling(count: int) -> dict[str, Any]:
    defs: dict[str, Any] = {"d0": {"type": "string"}}
    for i in range(1, count):
        one = {"$ref": f"#/$defs/d{i - 1}"}
        defs[f"d{i}"] = {"type": "object", "properties": {"l": one, "r": one}}
    return {"$defs": defs, "$ref": f"#/$defs/d{count - 1}"}


REFUSED = {
    "10,000 open brackets": {"regex": "(" * 1500 + "a" + ")" * 1500},
    "look-ahead": {"regex": "(?=a)b"},
    "not closed": {"regex": "[abc"},
    "a long regex": {"regex": "a" * 5000},
    "deep schema": {"json_schema": nested(300)},
    "100,000 values": {"json_schema": {"enum": [f"value {i}" for i in range(100_000)]}},
    "a reference to itself": {"json_schema": {"$ref": "#"}},
    "references in a circle": {
        "json_schema": {
            "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}},
            "$ref": "#/$defs/a",
        }
    },
    "a reference to elsewhere": {"json_schema": {"$ref": "http://127.0.0.1/schema.json"}},
    "a product of choices": {"json_schema": all_of_any_of(12)},
    "nothing fits": {"json_schema": {"type": "integer", "minimum": 2, "maximum": 1}},
    "the library's own switches": {"json_schema": {"x-guidance": {"lenient": True}, "not": {}}},
    "no grammar": {"grammar": 'start: "a'},
    "no start": {"grammar": 'other: "a"'},
    "a file": {"grammar": "%import /etc/passwd.WORD\nstart: WORD"},
    "too many choices": {"choice": ["x"] * 1025},
    "an empty choice": {"choice": ["a", ""]},
}
FOLLOWED = {
    "nested stars": {"regex": "(a+)+b"},
    "the same twice": {"regex": "(a|a)*"},
    "a million times": {"regex": "a{1,1000000}"},
    "a million times a million": {"regex": "((a{1,100}){1,100}){1,100}"},
    "an exponential automaton": {"regex": "(a|b)*a(a|b){40}"},
    "many letters": {"regex": "\\p{L}{1,500}x"},
    "4,000 values": {"json_schema": {"enum": [f"value {i}" for i in range(4000)]}},
    "a recursive schema": {
        "json_schema": {"type": "object", "properties": {"child": {"$ref": "#"}}}
    },
    "references that double": {"json_schema": doubling(30)},
    "a long text": {"json_schema": {"type": "string", "minLength": 1_000_000}},
    "a long list": {
        "json_schema": {"type": "array", "items": {"type": "integer"}, "minItems": 100_000}
    },
    "an ambiguous grammar": {"grammar": 'start: start start | "a" | '},
    "awkward patterns": {
        "json_schema": {
            "type": "object",
            "patternProperties": {"^(a|b)*a(a|b){30}$": {"type": "integer"}},
        }
    },
}

_FOLLOW = """
import json, resource, sys, time
import numpy as np
from jaxserve.engine.grammar.compiler import GrammarCompiler, GrammarStuck
from jaxserve.engine.grammar.constraint import constraint_from_json
from jaxserve.errors import InvalidRequest
from tests.engine.tiny_tokenizers import EOS, byte_tokenizer

def peak_mib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

compiler = GrammarCompiler(byte_tokenizer(), vocab_size=EOS + 1, eos_token_ids=(EOS,))
compiler.prepare().result()
before, start = peak_mib(), time.process_time()
try:
    grammar = compiler.compile(constraint_from_json("constraint", json.load(sys.stdin)))
except InvalidRequest as error:
    print(json.dumps({"refused": error.field, "cpu_s": time.process_time() - start,
                      "mib": peak_mib() - before}))
    sys.exit()
compiled_s = time.process_time() - start
rng = np.random.default_rng(0)
matcher, words, slowest_s, tokens = grammar.matcher.deep_copy(), grammar.first_words, 0.0, []
for _ in range(200):
    allowed = np.flatnonzero(np.unpackbits(np.frombuffer(words, np.uint8), bitorder="little"))
    tokens.append(int(rng.choice(allowed)))
    if tokens[-1] == EOS:
        break
    start = time.process_time()
    assert matcher.consume_token(tokens[-1])
    try:
        words = compiler.reader.words(matcher)
    except GrammarStuck:
        tokens.append(-1)
        break
    finally:
        slowest_s = max(slowest_s, time.process_time() - start)
print(json.dumps({"cpu_s": compiled_s, "slowest_s": slowest_s, "tokens": len(tokens),
                  "mib": peak_mib() - before}))
"""


def measured(constraint: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own, so that its memory can be told."""
    done = subprocess.run(
        [sys.executable, "-c", _FOLLOW],
        input=json.dumps(constraint),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", REFUSED)
def test_refused(running, name):
    """In the engine's own process: it serves on, which later tests see."""
    with pytest.raises(InvalidRequest) as refusal:
        running.engine.grammars.compile(constraint_from_json("constraint", REFUSED[name]))
    [kind] = REFUSED[name]
    assert refusal.value.field == f"constraint.{kind}"
    assert len(str(refusal.value)) < 500


@pytest.mark.parametrize("name", ["100,000 values", "a product of choices"])
def test_refused_within_bounds(name):
    report = measured(REFUSED[name])
    assert "refused" in report
    assert report["cpu_s"] < 1
    assert report["mib"] < 64


@pytest.mark.long
@pytest.mark.parametrize("name", [name for name in FOLLOWED if name != "4,000 values"])
def test_followed_within_bounds(name):
    check_followed(name)


def test_many_values_are_followed_within_bounds():
    check_followed("4,000 values")


def check_followed(name: str) -> None:
    report = measured(FOLLOWED[name])
    assert "refused" not in report, report
    assert report["cpu_s"] < 1
    assert report["mib"] < 64
    assert report["slowest_s"] < 0.1
    assert report["tokens"] >= 1


def test_no_more_is_kept_than_the_bounds_say(running):
    grammars = running.engine.grammars
    for index in range(3):
        values = [f"{index} value {i}" for i in range(3500)]
        grammars.compile(Constraint.json_schema({"enum": values}))
    for index in range(150):
        grammars.compile(Constraint.json_schema({"const": index}))
    assert len(grammars._cached) <= 128
    sizes = [len(constraint.source) for constraint in grammars._cached]
    assert sum(sizes) == grammars._num_cached_bytes <= 1 << 20
