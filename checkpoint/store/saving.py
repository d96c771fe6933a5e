"""One save: what runs in the background, and the handle that the caller keeps."""

from __future__ import annotations

import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.store.commit import CommitRecord
from checkpoint.store.digests import blake3_of_file
from checkpoint.store.durable import (
    Deadline,
    fsync_tree,
    sha256_hex,
    walk_files,
    write_new_file,
)
from checkpoint.store.errors import SaveFailed, SaveTimedOut
from checkpoint.store.gate import Gate, clear_staging
from checkpoint.store.layout import ARRAYS, COMMIT, MANIFEST, StoreLayout
from checkpoint.store.manifest import ArrayRecord, FileRecord, Manifest
from checkpoint.store.orbax_io import ArrayReader, ArrayWrite
from checkpoint.store.tree import HostLeaf, digest
from checkpoint.store.verification import read_array

PUBLISH_GRACE_S = 60.0
MAX_REASON_CHARS = 1000


class SaveHandle:
    """A save that is under way, or over.

    Attributes:
        step: what is being saved.
    """

    def __init__(self, step: int, deadline: Deadline) -> None:
        self.step = step
        self._deadline = deadline
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._publishing = False
        self._error: BaseException | None = None
        self._seen = False

    @property
    def done(self) -> bool:
        """Whether it is over, well or not."""
        if self._deadline.remaining_s <= 0:
            self._give_up()
        return self._over.is_set()

    @property
    def error(self) -> BaseException | None:
        """What went wrong; None while it runs or if all is well. For polling."""
        if not self.done:
            return None
        self._seen = True
        return self._error

    def wait(self, timeout_s: float | None = None) -> None:
        """Returns once the step is committed: it will be there after a crash.

        Args:
            timeout_s: how long to wait, in seconds; the save itself goes on. By default
                until the save's own time is up.

        Raises:
            SaveFailed: this save's own error.
            SaveTimedOut: the save took longer than `save_timeout_s` and was given up.
            Fenced: another writer has the store.
            TimeoutError: `timeout_s` is over, and the save still runs.
        """
        if timeout_s is not None and timeout_s < self._deadline.remaining_s:
            if not self._over.wait(timeout_s):
                raise TimeoutError(f"step {self.step} is not saved after {timeout_s:g} s")
        elif not self.wait_until_over():
            raise SaveTimedOut(
                f"step {self.step}: its last rename hangs; whether it is saved is unknown"
            )
        if self.error is not None:
            raise self.error

    def wait_until_over(self) -> bool:
        """Waits until the save's own time is up at most; raises nothing. Whether it is over."""
        if not self._over.wait(self._deadline.remaining_s) and not self._give_up():
            self._over.wait(PUBLISH_GRACE_S)
        return self._over.is_set()

    @property
    def has_unseen_error(self) -> bool:
        """Whether it failed and nobody asked."""
        return self._over.is_set() and self._error is not None and not self._seen

    def begin_publishing(self) -> bool:
        """For the saving thread: from now on the save cannot be given up. False if it was."""
        with self._lock:
            self._publishing = not self._over.is_set()
            return self._publishing

    def settle(self, error: BaseException | None) -> None:
        """For the saving thread: the outcome. The first one counts."""
        with self._lock:
            if not self._over.is_set():
                self._error = error
                self._over.set()

    def _give_up(self) -> bool:
        with self._lock:
            if self._publishing:
                return False
            if not self._over.is_set():
                self._error = SaveTimedOut(
                    f"step {self.step} was not saved within {self._deadline.timeout_s:g} s; "
                    "is the storage slow or hung? Raise save_timeout_s if it is only slow"
                )
                self._over.set()
            return True


@dataclass(frozen=True)
class SaveTask:
    """All that a save needs.

    Attributes:
        layout, gate: of the store.
        step: its number.
        leaves: the values, by name; owned by the task.
        stacked: names that are stored in one chunk per layer.
        metadata: JSON values.
        read_back: whether all arrays are read again and compared before the commit.
        deadline: when to give up.
    """

    layout: StoreLayout
    gate: Gate
    step: int
    leaves: Mapping[str, HostLeaf]
    stacked: Collection[str]
    metadata: Mapping[str, Any]
    read_back: bool
    deadline: Deadline

    def run(self, begin_publishing: Callable[[], bool]) -> None:
        """Writes, checks, commits and publishes; leaves nothing behind when it fails.

        Raises:
            SaveFailed: with what went wrong as its cause.
            Fenced: another writer has the store.
        """
        token = f"{self.gate.epoch:08d}-{self.step:012d}-{secrets.token_hex(4)}"
        staged = self.layout.staging / token
        try:
            clear_staging(self.layout, self.gate.epoch)
            staged.mkdir()
            self._write(staged)
            self.deadline.check("committing")
            if not begin_publishing():
                raise SaveTimedOut(f"step {self.step} was given up")
            self.gate.publish(staged, self.layout.step(self.step))
        except Exception as error:
            self.gate.check()  # A newer writer clears staging: that is then the reason.
            if isinstance(error, SaveFailed):
                raise
            reason = f"{type(error).__name__}: {error}".replace(f"{staged}/", "")
            reason = reason.splitlines()[0][:MAX_REASON_CHARS]
            raise SaveFailed(
                f"step {self.step} was not saved: {reason}. "
                "Earlier steps are whole, what was half-written is removed"
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _write(self, staged: Path) -> None:
        arrays = {name: leaf.array for name, leaf in self.leaves.items() if leaf.array.size}
        records: dict[str, ArrayRecord] = {}
        if arrays:
            write = ArrayWrite.start(staged / ARRAYS, arrays, self.stacked, self.deadline)
            try:
                records = self._records()  # While the files are being written.
                write.wait()
            finally:
                write.close()
        else:
            records = self._records()
        commit_staged(
            *(staged, self.step, self.gate.epoch, records, self.metadata, self.deadline),
            read_back=self.read_back,
        )

    def _records(self) -> dict[str, ArrayRecord]:
        records = {}
        for name, leaf in self.leaves.items():
            array = leaf.array
            records[name] = ArrayRecord(array.shape, array.dtype.name, digest(array), leaf.key_impl)
            self.deadline.check(f"computing the digest of {name}")
        return records


def commit_staged(
    staged: Path,
    step: int,
    epoch: int,
    records: Mapping[str, ArrayRecord],
    metadata: Mapping[str, Any],
    deadline: Deadline,
    *,
    read_back: bool = True,
    known_files: Mapping[str, FileRecord] | None = None,
) -> None:
    """Turns a folder with array files into a checkpoint, not yet published.

    Files that are not in `known_files` are read, for their digests.

    Raises:
        SaveFailed: an array is not what its record says.
        OSError: the system refuses.
    """
    fsync_tree(staged, deadline)
    if read_back:
        _read_back(staged, step, records, deadline)
    files = _file_records(staged, known_files or {}, deadline)
    manifest_bytes = Manifest(step, records, files, metadata).encode()
    write_new_file(staged / MANIFEST, manifest_bytes)
    commit = CommitRecord(step, epoch, sha256_hex(manifest_bytes), round(time.time(), 3))
    write_new_file(staged / COMMIT, commit.encode())


def _read_back(
    staged: Path, step: int, records: Mapping[str, ArrayRecord], deadline: Deadline
) -> None:
    reader = ArrayReader(staged / ARRAYS)
    for name, record in records.items():
        try:
            read_array(reader, name, record)
        except ValueError as error:
            raise SaveFailed(
                f"step {step} was not saved: array {name} read back: {error}. "
                "Earlier steps are whole"
            ) from error
        deadline.check(f"reading back {name}")


def _file_records(
    staged: Path, known: Mapping[str, FileRecord], deadline: Deadline
) -> dict[str, FileRecord]:
    records = {}
    for path, _ in walk_files(staged):
        file = staged / path
        if path in known:
            records[path] = known[path]
            continue
        deadline.check(f"computing the digest of {path}")
        blake3 = blake3_of_file(file, lambda: deadline.check("computing digests"))
        records[path] = FileRecord(file.stat().st_size, blake3)
    return records
