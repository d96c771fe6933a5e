"""What a model's text turns out to hold: text for the user, and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class TextPiece:
    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    index: int
    """Of the call in its answer, from 0."""
    name: str


@dataclass(frozen=True, slots=True)
class ArgumentsPiece:
    """More of a call's arguments: joined, they are one JSON object."""

    index: int
    text: str


Piece = TextPiece | CallStart | ArgumentsPiece


class ToolCallParser(Protocol):
    """Reads one answer. Text that could still become a call is held back, and nothing is lost:
    what looked like a call and was none comes out as text."""

    def push(self, text: str) -> list[Piece]:
        """The next piece of the answer's text."""
        ...

    def finish(self) -> list[Piece]:
        """The answer has ended."""
        ...


def text_pieces(text: str) -> list[Piece]:
    """The text, if there is any."""
    return [TextPiece(text)] if text else []
