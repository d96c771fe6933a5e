"""The journal: which windows are written, with a digest of what they should hold.

One line a window, in order. A line says up to where an array is done and the digest of its
bytes up to there, so a resumed migration can tell whether the source still gives the same.
A torn last line, as `kill -9` leaves it, is dropped. Nothing here is trusted about the disk:
after a power failure the read-back of the whole target is what finds lost writes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from checkpoint.migrate.plan import Window

KeyOfWindow = tuple[str, int, int]


def key_of(window: Window) -> KeyOfWindow:
    """Array, part and end of the rows: names a window in a given plan."""
    return window.array.name, window.part_index, window.stop


class Journal:
    """An append-only file of finished windows; a context manager.

    Attributes:
        done: digest of the array up to a window's end, by window.
    """

    def __init__(self, path: Path) -> None:
        self.done: Mapping[KeyOfWindow, str] = {}
        done: dict[KeyOfWindow, str] = {}
        good_bytes = 0
        if path.exists():
            data = path.read_bytes()
            for line in data.splitlines(keepends=True):
                entry = _entry(line)
                if entry is None:
                    break
                done[entry[0]] = entry[1]
                good_bytes += len(line)
        self.done = done
        self._file = path.open("ab")
        os.ftruncate(self._file.fileno(), good_bytes)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def append(self, window: Window, prefix_blake3: str) -> None:
        """Record that `window` is in the target."""
        line = json.dumps([*key_of(window), prefix_blake3], separators=(",", ":"))
        self._file.write(line.encode() + b"\n")
        self._file.flush()


def _entry(line: bytes) -> tuple[KeyOfWindow, str] | None:
    try:
        name, part_index, stop, blake3 = json.loads(line)
    except ValueError:
        return None
    return ((name, part_index, stop), blake3) if line.endswith(b"\n") else None
