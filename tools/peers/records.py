"""Records: what was measured, one JSON line each; a run goes on where the last one stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
"""`kind` says what it is of: load, start, quality, machine."""


class Records:
    """The file of a comparison."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "records.jsonl"
        self._records = read_records(self.path) if self.path.exists() else []

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    def has(self, **fields: object) -> bool:
        """Whether a record has all these fields."""
        return any(
            all(record.get(name) == value for name, value in fields.items())
            for record in self._records
        )

    def add(self, record: Record) -> None:
        """On disk when this returns."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._records.append(record)


def read_records(path: Path) -> list[Record]:
    """Raises ValueError with the number of a line that is not whole."""
    records = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is not JSON: delete it") from error
    return records
