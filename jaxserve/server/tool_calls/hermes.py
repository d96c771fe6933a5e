"""Calls between tags, as Hermes, Qwen and others write them: `<tool_call>{…}</tool_call>`."""

from __future__ import annotations

from jaxserve.server.tool_calls.call_reader import CallReader
from jaxserve.server.tool_calls.pieces import Piece, text_pieces

BEGIN, END = "<tool_call>", "</tool_call>"


class HermesParser:
    """Space around calls is left out."""

    def __init__(self) -> None:
        self._held = ""
        """Text that may be space before a call, or the beginning of a tag."""
        self._call: CallReader | None = None
        self._tail: str | None = None
        """What came since the end of the call's object; None before it."""
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        """See `ToolCallParser`."""
        pieces: list[Piece] = []
        while text:
            if self._call is None:
                found, text = self._read_text(text)
            elif self._tail is None:
                found, text = self._read_call(self._call, text)
            else:
                found, text = self._read_end(text)
            pieces += found
        return pieces

    def finish(self) -> list[Piece]:
        """See `ToolCallParser`."""
        call, self._call = self._call, None
        if call is not None and not call.has_started:
            return text_pieces(self._held + BEGIN + call.text)
        held, self._held = self._held, ""
        if self._num_calls and not held.strip():
            return []
        return [] if call is not None else text_pieces(held)

    def _read_text(self, text: str) -> tuple[list[Piece], str]:
        text = self._held + text
        before, tag, after = text.partition(BEGIN)
        if tag:
            visible = before.rstrip()
            # Kept, in case that it is no call.
            self._held = before[len(visible) :]
            self._call, self._tail = CallReader(self._num_calls), None
            return text_pieces(visible), after
        visible = text[: len(text) - _overlap(text, BEGIN)].rstrip()
        self._held = text[len(visible) :]
        return text_pieces(visible), ""

    def _read_call(self, call: CallReader, text: str) -> tuple[list[Piece], str]:
        if not call.text:
            text = text.lstrip()
            if text and text[0] != "{":
                return self._give_up(call), text
        pieces, rest = call.push(text)
        if call.is_broken:
            return self._give_up(call), rest
        if call.is_complete:
            self._num_calls += 1
            self._tail, self._held = "", ""
        return pieces, rest

    def _give_up(self, call: CallReader) -> list[Piece]:
        text, self._held, self._call = self._held + BEGIN + call.text, "", None
        return text_pieces(text)

    def _read_end(self, text: str) -> tuple[list[Piece], str]:
        assert self._tail is not None
        self._tail += text
        stripped = self._tail.lstrip()
        if stripped.startswith(END):
            self._call, self._tail = None, None
            return [], stripped[len(END) :]
        if END.startswith(stripped):
            return [], ""
        # The closing tag is missing.
        self._call, self._tail = None, None
        return [], stripped


def _overlap(text: str, tag: str) -> int:
    """Characters at the end of `text` that may be the beginning of `tag`."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
