"""JSON objects out of a model's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from checkpoint.errors import FormatError

MAX_JSON_BYTES = 16 * 1024 * 1024


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in `path`, None when there is no such file.

    Raises:
        FormatError: too large, not JSON, or not an object.
    """
    fields = _read(path)
    if fields is not None and not isinstance(fields, dict):
        raise FormatError(f"{path.name} must hold a JSON object")
    return fields


def read_json_objects(path: Path) -> list[dict[str, Any]] | None:
    """The list of objects in `path`, None when there is no such file.

    Raises:
        FormatError: too large, not JSON, or not a list of objects.
    """
    values = _read(path)
    if values is None:
        return None
    if not isinstance(values, list) or not all(isinstance(value, dict) for value in values):
        raise FormatError(f"{path.name} must hold a list of JSON objects")
    return values


def _read(path: Path) -> Any:
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FormatError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name} is not valid JSON: {error}") from error
