"""The examples in docstrings and documents do what they say."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["trapezoid", "factory", "tuner"])
def test_docstrings(name: str) -> None:
    result = doctest.testmod(importlib.import_module(f"schedules.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


def test_document() -> None:
    result = doctest.testfile(str(ROOT / "docs" / "schedules.md"), module_relative=False)
    assert result.attempted > 0
    assert result.failed == 0
