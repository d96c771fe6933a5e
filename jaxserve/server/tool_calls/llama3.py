"""Calls as Llama 3 writes them: an answer that is nothing but `{"name": …, "parameters": {…}}`."""

from __future__ import annotations

from jaxserve.server.tool_calls.call_reader import CallReader
from jaxserve.server.tool_calls.pieces import Piece, text_pieces

TAG = "<|python_tag|>"
"""May stand before; it is a special token, which texts leave out unless they are asked for."""
BETWEEN = ";"


class Llama3Parser:
    """An answer that does not begin with a call has none. Several are parted by semicolons."""

    def __init__(self) -> None:
        self._held = ""
        """Space, a tag or a semicolon before a call."""
        self._call: CallReader | None = None
        self._is_text = False
        self._num_calls = 0

    def push(self, text: str) -> list[Piece]:
        """See `ToolCallParser`."""
        pieces: list[Piece] = []
        while text:
            if self._is_text:
                return pieces + text_pieces(text)
            if self._call is None:
                found, text = self._read_start(text)
            else:
                found, text = self._read_call(self._call, text)
            pieces += found
        return pieces

    def finish(self) -> list[Piece]:
        """See `ToolCallParser`."""
        if self._call is None:
            return [] if self._num_calls else text_pieces(self._held)
        return [] if self._call.has_started else text_pieces(self._held + self._call.text)

    def _read_start(self, text: str) -> tuple[list[Piece], str]:
        self._held += text
        rest = self._held.lstrip()
        if self._num_calls:
            rest = rest.removeprefix(BETWEEN).lstrip()
        elif TAG.startswith(rest):
            return [], ""
        else:
            rest = rest.removeprefix(TAG).lstrip()
        if not rest:
            return [], ""
        if rest[0] == "{":
            self._held = self._held[: len(self._held) - len(rest)]
            self._call = CallReader(self._num_calls)
            return [], rest
        self._is_text = True
        held, self._held = self._held, ""
        return [], held

    def _read_call(self, call: CallReader, text: str) -> tuple[list[Piece], str]:
        pieces, rest = call.push(text)
        if call.is_broken:
            self._is_text, self._call = True, None
            held, self._held = self._held, ""
            return text_pieces(held + call.text), rest
        if call.is_complete:
            self._num_calls += 1
            self._call, self._held = None, ""
        return pieces, rest
