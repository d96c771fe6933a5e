"""The folder in which a target is made, beside where it will be: one process at a time.

    .NAME.migrating/
        plan.json       digest of the plan, its size of windows, and what the source was
        journal.jsonl   finished windows
        out/            the target so far

A later run with the same plan goes on with it; one with another plan is refused.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from checkpoint.migrate.errors import MigrationError, MigrationRunning, SourceChanged
from checkpoint.store.durable import fsync_path

NUM_TRIES = 10
_RECORD = "plan.json"


def workspace_path(target: Path) -> Path:
    """Where the unfinished target lies."""
    return target.parent / f".{target.name}.migrating"


class Workspace:
    """The locked folder; a context manager. Leaving it keeps the folder, `remove` ends it.

    Attributes:
        out: where the target is made.
        is_resumed: whether an unfinished migration was found.
    """

    def __init__(
        self,
        target: Path,
        plan_sha256: str,
        source: Mapping[str, Any],
        *,
        window_bytes: int,
        restart: bool,
    ) -> None:
        """Lock and open, or make.

        Args:
            target: the path that will be published.
            plan_sha256: of the plan.
            source: what identifies the source without reading it: sizes, times; JSON values.
            window_bytes: of the plan, for `recorded_window_bytes`.
            restart: throw an unfinished migration away.

        Raises:
            MigrationRunning: another process has it.
            SourceChanged: the unfinished migration had another source.
            MigrationError: it had another plan.
        """
        self._path = workspace_path(target)
        self._descriptor = _lock(self._path)
        try:
            record = {"plan": plan_sha256, "window_bytes": window_bytes, "source": dict(source)}
            self.is_resumed = self._prepare(record, restart)
        except BaseException:
            os.close(self._descriptor)
            raise

    def __enter__(self) -> Workspace:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        os.close(self._descriptor)

    @property
    def out(self) -> Path:
        """The target so far: a folder."""
        return self._path / "out"

    @property
    def journal(self) -> Path:
        """The journal's file."""
        return self._path / "journal.jsonl"

    @staticmethod
    def recorded_source(path: Path) -> dict[str, Any] | None:
        """What the unfinished migration at `path` had as its source."""
        there = _read(path / _RECORD)
        return None if there is None else there.get("source")

    @staticmethod
    def recorded_window_bytes(path: Path) -> int | None:
        """The size of windows of the unfinished migration at `path`."""
        there = _read(path / _RECORD)
        found = None if there is None else there.get("window_bytes")
        return found if isinstance(found, int) else None

    def remove(self) -> None:
        """Delete the folder, after its content was published."""
        shutil.rmtree(self._path)

    def _prepare(self, wanted: Mapping[str, Any], restart: bool) -> bool:
        record = self._path / _RECORD
        there = _read(record)
        if restart or there is None:  # Killed before the plan was recorded: nothing is kept.
            for path in self._path.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            self.out.mkdir()
            staged = record.with_suffix(".new")
            staged.write_text(json.dumps(wanted))
            fsync_path(staged)
            staged.rename(record)
            return False
        if there.get("source") != json.loads(json.dumps(wanted["source"])):
            raise SourceChanged(
                f"{self._path} holds an unfinished migration of another source, or the source has "
                "changed since; pass --restart to begin anew"
            )
        if there.get("plan") != wanted["plan"]:
            raise MigrationError(
                f"{self._path} holds an unfinished migration with other settings; use those, or "
                "pass --restart to begin anew"
            )
        self.out.mkdir(exist_ok=True)
        return True


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        fields = json.loads(path.read_text())
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None


def _lock(path: Path) -> int:
    for _ in range(NUM_TRIES):
        path.mkdir(mode=0o755, parents=False, exist_ok=True)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Another process may have finished and removed it between the two calls.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise MigrationRunning(
                f"another process is making the same target (it has {path}); wait for it, or "
                "stop it"
            ) from None
        os.close(descriptor)
    raise MigrationRunning(f"{path} comes and goes: other processes are making the same target")
