"""CallReader: a call as models write it, `{"name": …, "arguments": {…}}`, while it comes."""

from __future__ import annotations

import json
import re
from typing import Any

from jaxserve.server.tool_calls.pieces import ArgumentsPiece, CallStart, Piece

_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{)'
)
_MAX_HEAD_CHARS = 1024
"""A call whose name is not told by then is read as a whole: no need to look for it again."""


class ObjectScanner:
    """Finds the end of a JSON object in text that comes in pieces."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def end(self, text: str) -> int | None:
        """Where in `text`, which goes on from what came before, the object has ended."""
        for index, character in enumerate(text):
            if self._is_escaped:
                self._is_escaped = False
            elif self._in_string:
                self._is_escaped = character == "\\"
                self._in_string = character != '"'
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return index + 1
        return None


class CallReader:
    """Reads one call from its first character on.

    Its arguments come out as they come in, if its name stands first; else when it is complete.
    """

    def __init__(self, index: int) -> None:
        self._index = index
        self._scanner = ObjectScanner()
        self._arguments: ObjectScanner | None = None
        self._arguments_done = False
        self.text = ""
        """All that was read of it."""
        self.has_started = False
        """A piece of it came out."""
        self.is_complete = False
        self.is_broken = False
        """It is complete, and no call."""

    def push(self, text: str) -> tuple[list[Piece], str]:
        """The pieces that this gives, and the text after the end of the call."""
        end = self._scanner.end(text)
        mine, rest = (text, "") if end is None else (text[:end], text[end:])
        before = len(self.text)
        self.text += mine
        self.is_complete = end is not None
        pieces: list[Piece] = []
        if not self.has_started and before <= _MAX_HEAD_CHARS:
            head = _HEAD.match(self.text)
            name = None if head is None else _string(head[1])
            if head is not None and name is not None:
                pieces.append(CallStart(self._index, name))
                self.has_started = True
                self._arguments = ObjectScanner()
                mine = self.text[head.end() :]
        if self._arguments is not None and not self._arguments_done:
            end = self._arguments.end(mine)
            self._arguments_done = end is not None
            if mine[:end]:
                pieces.append(ArgumentsPiece(self._index, mine[:end]))
        if self.is_complete and not self.has_started:
            pieces = self._whole()
        return pieces, rest

    def _whole(self) -> list[Piece]:
        call = _loads(self.text)
        if isinstance(call, dict):
            name = call.get("name")
            arguments = call.get("arguments", call.get("parameters"))
            if isinstance(name, str) and isinstance(arguments, dict):
                self.has_started = True
                text = json.dumps(arguments, ensure_ascii=False)
                return [CallStart(self._index, name), ArgumentsPiece(self._index, text)]
        self.is_broken = True
        return []


def _string(text: str) -> str | None:
    value = _loads(text)
    return value if isinstance(value, str) else None


def _loads(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
