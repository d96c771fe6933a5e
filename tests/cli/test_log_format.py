"""The log of a server as JSON lines."""

from __future__ import annotations

import json
import logging

import pytest

from jaxserve.cli.log_format import JsonLines, LogFormat, start_log


def _line(message: str, *arguments: object, exc_info=None) -> str:
    record = logging.LogRecord("a.b", logging.ERROR, "file", 1, message, arguments, exc_info)
    return JsonLines().format(record)


def test_a_record_is_one_line_whatever_it_holds():
    line = _line("two\nlines of %s", '"x"\r\n\u2028')
    assert line.splitlines() == [line]
    values = json.loads(line)
    assert values["message"] == 'two\nlines of "x"\r\n\u2028'
    assert (values["level"], values["logger"]) == ("ERROR", "a.b")
    assert values["time"].endswith("+00:00")


def test_an_exception_is_a_field():
    try:
        raise KeyError("x")
    except KeyError as error:
        line = _line("failed", exc_info=(KeyError, error, error.__traceback__))
    assert "KeyError" in json.loads(line)["exception"]
    assert "\n" not in line


@pytest.mark.parametrize("log_format", list(LogFormat))
def test_the_log_goes_to_stderr(log_format, monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])
    start_log(log_format)
    logging.getLogger("jaxserve.x").warning("it is %s", "late")
    line = capsys.readouterr().err
    if log_format is LogFormat.JSON:
        assert json.loads(line)["message"] == "it is late"
    else:
        assert line == "WARNING jaxserve.x: it is late\n"
