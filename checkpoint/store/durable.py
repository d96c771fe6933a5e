"""Bytes that survive a crash: canonical JSON, fsync of files and folders."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoint.store.errors import SaveTimedOut

NUM_SYNCS = 8


@dataclass(frozen=True)
class Deadline:
    """A bound on how long an operation may take.

    Attributes:
        timeout_s: seconds from its creation.
    """

    timeout_s: float
    _start_s: float = field(default_factory=time.monotonic)

    @property
    def remaining_s(self) -> float:
        """Seconds left, never below 0."""
        return max(0.0, self._start_s + self.timeout_s - time.monotonic())

    def check(self, doing: str) -> None:
        """Raises SaveTimedOut, which names what was being done, when time is up."""
        if self.remaining_s <= 0:
            raise SaveTimedOut(
                f"the save was given up after {self.timeout_s:g} s while {doing}; "
                "is the storage slow or hung? Raise save_timeout_s if it is only slow"
            )


def canonical_json(value: Any) -> bytes:
    """The one encoding of `value`: sorted keys, no blanks, ASCII, a newline at the end.

    Raises:
        ValueError, TypeError: NaN, infinity or something that JSON has no form for.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii") + b"\n"


def sha256_hex(data: bytes) -> str:
    """SHA-256 of `data`, in hex."""
    return hashlib.sha256(data).hexdigest()


def fsync_path(path: Path) -> None:
    """Forces a file, or a folder's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def start_writeback(descriptor: int, offset: int, num_bytes: int) -> None:
    """Starts to bring a range of a file to the disk, so that a later fsync has less to wait for.

    The system is told that the range is not needed in memory; it may ignore that.
    """
    os.posix_fadvise(descriptor, offset, num_bytes, os.POSIX_FADV_DONTNEED)


def fsync_tree(root: Path, deadline: Deadline) -> None:
    """Forces every file and folder under `root` to the disk: files, then folders, leaves first."""
    files: list[Path] = []
    folders: list[Path] = []
    for folder, _, names in os.walk(root, topdown=False, onerror=_raise):
        files += [Path(folder, name) for name in names]
        folders.append(Path(folder))

    def sync(path: Path) -> None:
        deadline.check(f"writing {path.name} to the disk")
        fsync_path(path)

    # Many at once: the file system then writes its own journal once for all of them.
    with ThreadPoolExecutor(NUM_SYNCS, thread_name_prefix="fsync") as pool:
        for paths in (files, folders):
            for _ in pool.map(sync, paths):
                pass


def write_new_file(path: Path, data: bytes) -> None:
    """Writes and fsyncs a file that must not exist yet, and its folder."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    fsync_path(path.parent)


def walk_files(root: Path) -> Iterator[tuple[str, bool]]:
    """Every non-folder under `root`: its path relative to `root` with slashes, and
    whether it is a plain file (not a link, pipe or device).

    Raises:
        OSError: a folder cannot be listed; it is never taken for an empty one.
    """
    for folder, folders, names in os.walk(root, onerror=_raise):
        for name in sorted(names):
            path = Path(folder, name)
            yield path.relative_to(root).as_posix(), path.is_file() and not path.is_symlink()
        for name in list(folders):
            path = Path(folder, name)
            if path.is_symlink():
                folders.remove(name)
                yield path.relative_to(root).as_posix(), False
        folders.sort()


def _raise(error: OSError) -> None:
    raise error
