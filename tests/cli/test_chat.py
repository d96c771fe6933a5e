"""`jaxserve chat`: what it refuses, and the advice that goes with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from typer.testing import CliRunner

from jaxserve.cli.chat import Conversation, app
from jaxserve.errors import ConfigError, InvalidRequest


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", "500"), "--temperature must be in"),
        (("--top-p", "0"), "--top-p must be in"),
        (("--max-tokens", "0"), "--max-tokens must be in"),
    ],
)
def test_a_bad_setting_is_told_before_a_model_is_loaded(
    flags: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, [*flags, "--model", "never-loaded"], catch_exceptions=False)


class Refusing:
    """Answers nothing, for a reason."""

    def __init__(self, error: InvalidRequest) -> None:
        self._error = error

    @contextlib.contextmanager
    def answer(
        self, messages: Sequence[dict[str, str]], settings: dict[str, Any]
    ) -> Iterator[list[Any]]:
        raise self._error
        yield []


@pytest.mark.parametrize(
    ("field", "helps"),
    [("prompt", True), ("chat.messages", True), ("sampling.top_p", False)],
)
def test_a_new_conversation_is_advised_where_it_helps(
    field: str, helps: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    conversation = Conversation(
        Refusing(InvalidRequest(field, "is wrong")), {}, system=None, stats=False
    )
    conversation.ask("hi")
    captured = capsys.readouterr()
    assert f"{field}: is wrong" in captured.err
    assert ("/reset" in captured.err) is helps
    assert conversation.messages == []
