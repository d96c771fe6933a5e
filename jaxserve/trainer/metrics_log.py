"""`metrics.jsonl`: what the progress bar shows, one line a committed step or evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxserve.trainer.event_files import EventFiles


def float_of_hex(text: str) -> float:
    """A float32 from the 8 hex digits of its bits."""
    return float(np.uint32(int(text, 16)).view(np.float32))


class MetricsLog:
    """Appends lines; goes back when a run does, so that a curve has no gap and no double."""

    def __init__(self, path: Path, events: EventFiles | None = None) -> None:
        """Opens or makes the file. `events` gets every line, too."""
        self._path = path
        self._events = events
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, fields: Mapping[str, Any]) -> None:
        """Adds a line."""
        self._file.write(json.dumps(fields) + "\n")
        self._file.flush()
        if self._events is not None:
            self._events.write(fields)

    def drop_from(self, step: int) -> None:
        """Takes back everything about `step` and later ones, and a torn last line."""
        kept = [line for line in _whole_lines(self._path) if json.loads(line)["step"] < step]
        temporary = self._path.with_name(f".{self._path.name}.new")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        self._file.close()
        temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Ends writing."""
        self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; one that is being written is left out."""
    return [json.loads(line) for line in _whole_lines(path)] if path.exists() else []


def _whole_lines(path: Path) -> list[str]:
    lines = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1]:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step"), int):
            lines.append(line)
    return lines
