"""`jaxserve models`, on an empty store."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jaxserve.cli.models import app


@pytest.fixture(autouse=True)
def _empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_lists_the_catalogue_with_the_way_to_get_each() -> None:
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 0
    assert "jaxserve pull smollm2-135m-instruct" in result.stdout


def test_json_lists_records() -> None:
    result = CliRunner().invoke(app, ["--json"])
    records = {record["name"]: record for record in json.loads(result.stdout)}
    assert "smollm2-135m-instruct" in records
    assert all(record["path"] is None for record in records.values())


def test_removing_what_is_not_there_says_so() -> None:
    result = CliRunner().invoke(app, ["remove", "smollm2-135m-instruct"])
    assert result.exit_code == 0
    assert "was not downloaded" in result.stdout
