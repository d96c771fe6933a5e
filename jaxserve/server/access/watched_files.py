"""WatchedFiles: whether files have changed since they were last read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

Signature = tuple[tuple[int, int, int, int] | None, ...]


class WatchedFiles:
    """Looks at the files' inodes, sizes and times: cheap enough for once a second."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._seen = self.signature()

    def signature(self) -> Signature:
        """Of what the paths lead to now."""
        return tuple(_signature(path) for path in self._paths)

    def changed(self) -> bool:
        """Whether they have changed since this was last asked, or since the beginning."""
        now = self.signature()
        before, self._seen = self._seen, now
        return now != before


def _signature(path: Path) -> tuple[int, int, int, int] | None:
    try:
        found = os.stat(path)  # noqa: PTH116  the same, without a Path's cost
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns
