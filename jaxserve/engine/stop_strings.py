"""Stop strings: where the text ends, whatever pieces it arrives in."""

from __future__ import annotations

from collections.abc import Sequence


class StopStringMatcher:
    """Passes text through and stops just before the first stop string.

    Nothing that could be the beginning of a stop string leaves before it is
    known not to be one. The match that is complete first wins; of several that
    end at one character, the longest. So the result depends on the text only
    and not on the pieces it arrives in.
    """

    def __init__(self, stop: Sequence[str], *, include_in_output: bool = False) -> None:
        self._stop = tuple(stop)
        self._include_in_output = include_in_output
        self._held = ""
        self.matched: str | None = None
        """The stop string that was met. Text after it is dropped."""

    def push(self, text: str) -> str:
        """Adds text and returns what may leave."""
        if not self._stop or self.matched is not None:
            return "" if self.matched is not None else text
        text = self._held + text
        self._held = ""
        match = self._first_match(text)
        if match is not None:
            start, end, self.matched = match
            return text[: end if self._include_in_output else start]
        num_safe = self._num_safe_characters(text)
        self._held = text[num_safe:]
        return text[:num_safe]

    def flush(self) -> str:
        """Returns what was held back: the text has ended, so it is no match."""
        held, self._held = self._held, ""
        return held

    def _first_match(self, text: str) -> tuple[int, int, str] | None:
        matches = []
        for stop in self._stop:
            start = text.find(stop)
            if start >= 0:
                matches.append((start, start + len(stop), stop))
        return min(matches, key=lambda match: (match[1], match[0]), default=None)

    def _num_safe_characters(self, text: str) -> int:
        """Length of `text` without its longest suffix that begins a stop string."""
        num_safe = len(text)
        for stop in self._stop:
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while 0 <= start < num_safe:
                if stop.startswith(text[start:]):
                    num_safe = start
                    break
                start = text.find(stop[0], start + 1)
        return num_safe
