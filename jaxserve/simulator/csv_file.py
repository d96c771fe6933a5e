"""CSV files that a user points at."""

from __future__ import annotations

import csv
from pathlib import Path

from jaxserve.errors import ConfigError


def read_csv(path: Path) -> list[dict[str, str]]:
    """One dict a row. Raises ConfigError if it cannot be read."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read as CSV: {error}") from error
