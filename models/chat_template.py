"""ChatTemplate: renders a model's Jinja template, the one place where this is done."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
from jinja2.exceptions import SecurityError

from models.chat_sandbox import BUDGET_KEY, Budget, ChatEnvironment, ChatTemplateError

MAX_OUTPUT_CHARACTERS = 4 << 20
MAX_SOURCE_CHARACTERS = 1 << 20


class ChatTemplate:
    """A compiled chat template. It came with the model and is treated as hostile.

    Args:
        source: the Jinja source.
        bos_token, eos_token: what the template's variables of these names hold.

    Raises ChatTemplateError when the source does not compile.
    """

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        if len(source) > MAX_SOURCE_CHARACTERS:
            raise ChatTemplateError(
                f"the chat template has {len(source)} characters, above the limit of "
                f"{MAX_SOURCE_CHARACTERS}"
            )
        try:
            self._template = ChatEnvironment().from_string(source)
        except (jinja2.TemplateError, SyntaxError, RecursionError, MemoryError) as error:
            raise ChatTemplateError(
                f"the chat template does not compile: {type(error).__name__}: {str(error)[:500]}"
            ) from None
        self._variables = {"bos_token": bos_token, "eos_token": eos_token}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: datetime | None = None,
    ) -> str:
        """The prompt text, at most MAX_OUTPUT_CHARACTERS long.

        Args:
            messages: from first to last, e.g. `{"role": "user", "content": "Hi"}`.
            add_generation_prompt: open the assistant's turn at the end.
            tools: what the template's variable of this name holds: functions that the assistant
                may call, as in OpenAI's API.
            now: gives the template `strftime_now`; without it there is none.

        Raises ChatTemplateError with the template's own message, or the limit
        that it broke.
        """
        variables: dict[str, Any] = {
            **self._variables,
            BUDGET_KEY: Budget(),
            "messages": [dict(message) for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None if tools is None else [dict(tool) for tool in tools],
            "documents": None,
        }
        if now is not None:
            variables["strftime_now"] = _Strftime(now)
        try:
            return _collect(self._template.generate(variables))
        except ChatTemplateError:
            raise
        except SecurityError as error:
            raise ChatTemplateError(f"the chat template does what it may not: {error}") from None
        except RecursionError:
            raise ChatTemplateError("the chat template recurses too deeply") from None
        except Exception as error:  # whatever the template's code brings about
            raise ChatTemplateError(
                f"the chat template failed: {type(error).__name__}: {str(error)[:500]}"
            ) from None


def _collect(pieces: Iterable[str]) -> str:
    parts: list[str] = []
    num_characters = 0
    for piece in pieces:
        num_characters += len(piece)
        if num_characters > MAX_OUTPUT_CHARACTERS:
            raise ChatTemplateError(
                f"the chat template's output passes {MAX_OUTPUT_CHARACTERS} characters"
            )
        parts.append(piece)
    return "".join(parts)


class _Strftime:
    """`strftime_now(format)` of a fixed moment."""

    def __init__(self, now: datetime) -> None:
        self._now = now

    def __call__(self, format: str) -> str:
        # A field width such as %999999999d would be honoured by the C library.
        if len(format) > 64 or re.search(r"%[^A-Za-z%]", format):
            raise ChatTemplateError("strftime_now takes a short format of plain % letters")
        return self._now.strftime(format)
