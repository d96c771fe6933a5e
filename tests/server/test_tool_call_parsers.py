"""Parsers of tool calls: the same pieces however the text is cut, and no text lost."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.server.tool_calls.formats import FORMATS
from jaxserve.server.tool_calls.pieces import ArgumentsPiece, CallStart, Piece, TextPiece


def read(kind: str, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text for the user, and the calls: names and arguments."""
    parser = FORMATS[kind].make_parser()
    pieces: list[Piece] = [piece for part in parts for piece in parser.push(part)]
    pieces += parser.finish()
    text, calls = "", []
    for piece in pieces:
        match piece:
            case TextPiece(more):
                text += more
            case CallStart(index, name):
                assert index == len(calls)
                calls.append((name, ""))
            case ArgumentsPiece(index, more):
                assert index == len(calls) - 1
                calls[index] = (calls[index][0], calls[index][1] + more)
    return text, calls


ONE = '{"name": "f", "arguments": {"x": "a }\\" b", "y": [1, {"z": {}}]}}'
ONE_CALL = ("f", '{"x": "a }\\" b", "y": [1, {"z": {}}]}')
OTHER = '{"arguments": {"k": 1}, "name": "g"}'
HERMES = {
    "plain": ("no call at all", "no call at all", []),
    "one": (f"<tool_call>\n{ONE}\n</tool_call>", "", [ONE_CALL]),
    "tight": (f"<tool_call>{ONE}</tool_call>", "", [ONE_CALL]),
    "two": (f"<tool_call>\n{ONE}\n</tool_call>\n<tool_call>\n{OTHER}\n</tool_call>\n", "",
            [ONE_CALL, ("g", '{"k": 1}')]),
    "text before": (f"I look.\n<tool_call>{ONE}</tool_call>", "I look.", [ONE_CALL]),
    "text after": (f"<tool_call>{ONE}</tool_call> done", " done", [ONE_CALL]),
    "parameters": ('<tool_call>{"name": "f", "parameters": {"a": 1}}</tool_call>', "",
                   [("f", '{"a": 1}')]),
    "no object": ("<tool_call>hello</tool_call>", "<tool_call>hello</tool_call>", []),
    "no call": ('<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    "bad JSON": ("<tool_call>{a}</tool_call>", "<tool_call>{a}</tool_call>", []),
    "no end": (f"<tool_call>\n{ONE}", "", [ONE_CALL]),
    "cut in the head": ('x <tool_call>\n{"name": "f', 'x <tool_call>{"name": "f', []),
    "cut in the arguments": ('<tool_call>{"name": "f", "arguments": {"x": "a', "",
                             [("f", '{"x": "a')]),
    "part of a tag": ("a <tool_ca", "a <tool_ca", []),
    "another tag": ("a <tool_box> b", "a <tool_box> b", []),
    "space": ("  hello \n", "  hello \n", []),
}  # fmt: skip
LLAMA = {
    "plain": ("no call at all", "no call at all", []),
    "one": (ONE, "", [ONE_CALL]),
    "tag": ('<|python_tag|>{"name": "f", "parameters": {"a": 1}}', "", [("f", '{"a": 1}')]),
    "two": (f"{ONE}; {OTHER}", "", [ONE_CALL, ("g", '{"k": 1}')]),
    "space": (f"\n {ONE} ", "", [ONE_CALL]),
    "an object": ('{"a": 1}', '{"a": 1}', []),
    "an object in space": (' {"a": 1} b', ' {"a": 1} b', []),
    "a call later": (f"see {ONE}", f"see {ONE}", []),
    "bad JSON": ("{a} b", "{a} b", []),
    "cut in the head": ('{"name": "f', '{"name": "f', []),
    "cut in the arguments": ('{"name": "f", "parameters": {"x"', "", [("f", '{"x"')]),
    "nothing": ("", "", []),
}
CASES = [("hermes", *case) for case in HERMES.values()] + [
    ("llama3", *case) for case in LLAMA.values()
]
NAMES = [f"hermes {name}" for name in HERMES] + [f"llama3 {name}" for name in LLAMA]


@pytest.mark.parametrize(("kind", "source", "text", "calls"), CASES, ids=NAMES)
def test_what_is_read(kind, source, text, calls):
    assert read(kind, [source]) == (text, calls)
    assert read(kind, list(source)) == (text, calls)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_cuts_change_nothing(data):
    kind, source, _, _ = data.draw(st.sampled_from(CASES))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(source)), max_size=6)))
    parts = [source[a:b] for a, b in zip([0, *cuts], [*cuts, len(source)], strict=True)]
    assert read(kind, parts) == read(kind, [source])


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<tool_call>",
                "</tool_call>",
                "\n",
                " ",
                "{",
                "}",
                '"name"',
                ":",
                ONE,
                '"',
                "\\",
                "<",
                ";",
                "text",
                "<|python_tag|>",
            ]
        ),
        max_size=8,
    ),
    st.sampled_from(sorted(FORMATS)),
)
def test_any_text_is_read_alike_in_one_piece_and_in_characters(parts, kind):
    source = "".join(parts)
    text, calls = read(kind, [source])
    assert read(kind, list(source)) == (text, calls)
    if not calls:
        assert text.split() == source.split() or "<tool_call>" in source


def test_arguments_come_while_they_are_written():
    parser = FORMATS["hermes"].make_parser()
    assert parser.push('<tool_call>\n{"name": "f", "arguments": {"x": ') == [
        CallStart(0, "f"),
        ArgumentsPiece(0, '{"x": '),
    ]
    assert parser.push("12") == [ArgumentsPiece(0, "12")]
    assert parser.push("3}}\n</tool_call>") == [ArgumentsPiece(0, "3}")]
    assert json.loads('{"x": ' + "12" + "3}") == {"x": 123}
