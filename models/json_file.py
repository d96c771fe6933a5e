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
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_JSON_BYTES:
        raise FormatError(f"{path.name} is larger than {MAX_JSON_BYTES} bytes")
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path.name} is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise FormatError(f"{path.name} must hold a JSON object")
    return fields
