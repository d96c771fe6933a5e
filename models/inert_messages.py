"""InertMessages: a chat's messages, whose text cannot be taken for the template's control tokens.

Whoever writes `<|im_end|>` in a message would else end it, and begin one of another role.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

MARKS = [chr(code) for code in range(0xE000, 0xF8FF)]
"""Of the area for private use, which has no characters of its own."""


class InertMessages:
    """Marks each control token that the messages spell out, so that the rendered chat can be
    divided there: no part has a whole one that the template did not write.

    Args:
        messages: with texts, lists and mappings of them.
        control_tokens: as they are spelled.
    """

    def __init__(
        self, messages: Sequence[Mapping[str, Any]], control_tokens: Iterable[str]
    ) -> None:
        # The longest first: one may be the beginning of another.
        spelled = sorted(filter(None, control_tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, spelled))) if spelled else None
        texts = list(_texts(messages))
        self.mark: str | None = None
        """Where to divide; None: nowhere."""
        self.messages = messages
        if self._pattern is not None and any(map(self._pattern.search, texts)):
            used = set().union(*texts)
            self.mark = next(mark for mark in MARKS if mark not in used)
            self.messages = self._marked(messages)

    def parts(self, rendered: str) -> list[str]:
        """The rendered chat, to be tokenised part by part."""
        return [rendered] if self.mark is None else rendered.split(self.mark)

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str) and self._pattern is not None:
            return self._pattern.sub(lambda found: self._divided(found[0]), value)
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(inner) for inner in value]
        return value

    def _divided(self, token: str) -> str:
        return f"{token[0]}{self.mark}{token[1:]}"


def _texts(value: Any) -> Iterable[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _texts(key)
            yield from _texts(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts(inner)
