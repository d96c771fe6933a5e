"""The ledger: what happened in a run, one line each, chained by hashes and fsynced.

A line is canonical JSON; `prev_sha256` is the SHA-256 of the line before it, without its
newline, so nothing can be changed, dropped or moved unnoticed. A new writer copies what is
whole into a new file and renames it over the old one: a writer of an earlier epoch that
wakes up late appends to a file that has no name any more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.store.durable import canonical_json, fsync_path
from jaxserve.trainer.errors import LedgerError

Record = dict[str, Any]
FIRST_PREV = "0" * 64


@dataclass(frozen=True)
class LedgerContent:
    """What a ledger file holds.

    Attributes:
        records: the whole lines, in order.
        lines: the same as bytes, without newlines.
        torn: what stands after the last whole line: a write that a crash cut short.
    """

    records: tuple[Record, ...]
    lines: tuple[bytes, ...]
    torn: bytes

    @property
    def last_sha256(self) -> str:
        """What the next line must name as its predecessor."""
        return sha256_of_line(self.lines[-1]) if self.lines else FIRST_PREV


def sha256_of_line(line: bytes) -> str:
    """The hash that the line after `line` holds."""
    return hashlib.sha256(line).hexdigest()


def read_ledger(path: Path) -> LedgerContent:
    """Reads a ledger and checks its chain.

    Raises:
        LedgerError: names the first line that does not continue the chain.
    """
    data = path.read_bytes()
    *lines, torn = data.split(b"\n")
    records: list[Record] = []
    prev = FIRST_PREV
    for number, line in enumerate(lines, 1):
        record = _parse(line)
        if record is None or record.get("prev_sha256") != prev:
            if number == len(lines) and not torn:
                # The last line may be torn and yet end with a newline of lost blocks.
                return LedgerContent(tuple(records), tuple(lines[:-1]), line + b"\n")
            raise LedgerError(
                f"{path}, line {number}: the chain of hashes is broken, so the file was changed "
                "after it was written. Bring back the original, or start another run_dir"
            )
        records.append(record)
        prev = sha256_of_line(line)
    return LedgerContent(tuple(records), tuple(lines), torn)


def committed_steps(records: Iterable[Record]) -> dict[int, Record]:
    """The one `step` record of every step that stands, by step.

    A `rollback` takes back every step from its `to_step` on.
    """
    steps: dict[int, Record] = {}
    for record in records:
        if record["kind"] == "step":
            steps[record["step"]] = record
        elif record["kind"] == "rollback":
            for step in [step for step in steps if step >= record["to_step"]]:
                del steps[step]
    return steps


class Ledger:
    """The one writer of a ledger file.

    Attributes:
        records: all of them, with those of earlier writers.
    """

    def __init__(
        self,
        path: Path,
        *,
        epoch: int,
        check_lease: Callable[[], None],
        clock: Callable[[], float],
    ) -> None:
        """Takes the file over, or makes it.

        Args:
            path: the ledger.
            epoch: of the lease; stands in every line.
            check_lease: raises when the lease is lost; called before every write.
            clock: wall-clock seconds.

        Raises:
            LedgerError: the chain is broken.
        """
        self._path = path
        self._epoch = epoch
        self._check_lease = check_lease
        self._clock = clock
        content = read_ledger(path) if path.exists() else LedgerContent((), (), b"")
        self.records = list(content.records)
        self._backlog: list[Mapping[str, Any]] = []
        self._prev = content.last_sha256
        check_lease()
        self._fd = _replace(path, content.lines)
        if content.torn:
            self.note(
                kind="torn_tail",
                num_bytes=len(content.torn),
                sha256=hashlib.sha256(content.torn).hexdigest(),
            )

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Adds lines and forces them to the disk; they stand when it returns.

        Raises:
            Fenced: another writer has the run.
            OSError: the disk is full or broken; nothing of these lines stands.
        """
        lines = []
        added = []
        prev = self._prev
        for fields in [*self._backlog, *records]:
            record = {
                "time_s": round(self._clock(), 6),
                **fields,
                "epoch": self._epoch,
                "prev_sha256": prev,
            }
            line = canonical_json(record).rstrip(b"\n")
            prev = sha256_of_line(line)
            lines.append(line + b"\n")
            added.append(record)
        if not lines:
            return
        self._check_lease()
        start = os.fstat(self._fd).st_size
        try:
            _write_all(self._fd, b"".join(lines))
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, start)
            raise
        self._prev = prev
        self._backlog = []
        self.records += added

    def note(self, **fields: Any) -> None:
        """Adds a line about something that has happened anyway. If the disk is full, the line
        comes with the next `append` that succeeds.

        Raises:
            Fenced: another writer has the run.
        """
        self._backlog.append({**fields, "time_s": round(self._clock(), 6)})
        with contextlib.suppress(OSError):
            self.append([])

    def close(self) -> None:
        """Ends writing."""
        os.close(self._fd)


def _parse(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def _replace(path: Path, lines: Iterable[bytes]) -> int:
    temporary = path.with_name(f".{path.name}.new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    _write_all(fd, b"".join(line + b"\n" for line in lines))
    os.fsync(fd)
    temporary.replace(path)
    fsync_path(path.parent)
    return fd


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def iterate_kind(records: Iterable[Record], kind: str) -> Iterator[Record]:
    """The records of one kind, in order."""
    return (record for record in records if record["kind"] == kind)
