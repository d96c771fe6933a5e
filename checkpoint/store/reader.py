"""Reading a store: every value is checked before it is handed out."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from checkpoint.store import quarantine
from checkpoint.store.errors import (
    CorruptStep,
    NoGoodStep,
    Problem,
    StepNotFound,
    StoreNotFound,
    StoreUnreadable,
)
from checkpoint.store.layout import ARRAYS, COMMIT, StoreLayout
from checkpoint.store.manifest import Manifest
from checkpoint.store.open_step import OpenStep
from checkpoint.store.orbax_io import ArrayReader
from checkpoint.store.tree import HostArray, PyTree, fill
from checkpoint.store.verification import (
    VerifyReport,
    file_problems,
    load_manifest,
    read_array,
    verify_folder,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A tree out of a store.

    Attributes:
        step: the step it was saved as.
        tree: the values.
        metadata: what was saved with them.
        skipped: newer steps that were corrupt.
    """

    step: int
    tree: PyTree
    metadata: dict[str, Any]
    skipped: tuple[CorruptStep, ...] = ()


class StoreReader:
    """Read access, for any number of processes, beside a writer or without one.

    Corrupt steps are skipped loudly and stay where they are; a `Store` quarantines them.
    A step is not deleted while it is being read.
    """

    def __init__(self, path: str | Path) -> None:
        """Raises StoreNotFound: `path` is no store."""
        self._layout = StoreLayout(Path(path).absolute())
        if not self._layout.steps.is_dir():
            raise StoreNotFound(f"{path} holds no checkpoints: there is no folder steps in it")

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._layout.root

    def steps(self) -> list[int]:
        """The committed steps, ascending; not verified."""
        return self._layout.list_steps()

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved with a step. Raises as `restore` does, but checks no arrays."""
        with self._judging(), self._pinned(step) as folder:
            return dict(load_manifest(folder, step).metadata)

    def verify(self, step: int) -> VerifyReport:
        """A full check of one step, which moves and changes nothing.

        Raises:
            StepNotFound, StoreUnreadable.
        """
        with self._pinned(step) as folder:
            return verify_folder(folder, step)

    def latest_good(self) -> int | None:
        """The newest step that passes the full check; None in a store never saved to.

        Raises:
            NoGoodStep: there were steps, and none is whole.
        """
        for step in self._newest_first():
            with contextlib.suppress(CorruptStep, StepNotFound), self._judging():
                report = self.verify(step)
                if report.ok:
                    return step
                raise CorruptStep(step, report.problems)
        self._check_never_used()
        return None

    def restore(self, step: int, abstract: PyTree) -> PyTree:
        """A step as a tree like `abstract`, bit for bit, whatever mesh it was saved from.

        Args:
            step: one of `steps()`.
            abstract: the structure; leaves with a sharding (`jax.ShapeDtypeStruct`,
                `jax.Array`) become `jax.Array`s placed so, others NumPy arrays.

        Raises:
            StepNotFound: there is no such step.
            CorruptStep: it is not what was saved. No value was handed out.
            TreeMismatch: it has other leaves, shapes or dtypes than `abstract`.
            StoreUnreadable: the system refuses to read.
        """
        return self._restore(step, abstract).tree

    def restore_latest(self, abstract: PyTree) -> Restored | None:
        """The newest good step as by `restore`; None in a store never saved to.

        Raises:
            NoGoodStep: there were steps, and none is whole.
            TreeMismatch, StoreUnreadable: as `restore`.
        """
        skipped: list[CorruptStep] = []
        for step in self._newest_first():
            try:
                restored = self._restore(step, abstract)
            except StepNotFound:
                continue  # Deleted by its writer since it was listed.
            except CorruptStep as error:
                skipped.append(error)
                continue
            if skipped:
                logger.error("%s: fell back to step %d", self.path, step)
            return Restored(step, restored.tree, restored.metadata, tuple(skipped))
        self._check_never_used()
        return None

    def read_arrays(self, step: int) -> dict[str, HostArray]:
        """All arrays of a step by name, on the host. Raises as `restore` does."""
        with self._judging(), self._pinned(step) as folder:
            manifest = self._checked_manifest(folder, step)
            read = _VerifiedReads(folder, manifest)
            return {name: read(name) for name in manifest.arrays}

    def open_step(self, step: int | None = None, *, check_files: bool = True) -> OpenStep:
        """A step whose arrays are then read one at a time.

        Args:
            step: one of `steps()`; by default the newest whose files are what was saved.
            check_files: compare every file with its digest first.

        Raises:
            StepNotFound: there is no such step.
            CorruptStep: its manifest or its files are not what was saved.
            NoGoodStep: no `step` was given, and none is whole.
            StoreUnreadable: the system refuses to read.
        """
        for candidate in self._newest_first() if step is None else [step]:
            try:
                return self._open_step(candidate, check_files)
            except (CorruptStep, StepNotFound):
                if step is not None:
                    raise
        self._check_never_used()
        raise StepNotFound(f"{self.path}: nothing was saved to it yet")

    def _newest_first(self) -> Iterator[int]:
        """Each step once, and then those saved meanwhile: a writer that keeps few
        may have deleted all of the listed ones before they were opened."""
        tried: set[int] = set()
        while listed := [step for step in self.steps() if step not in tried]:
            tried.update(listed)
            yield from reversed(listed)

    def _open_step(self, step: int, check_files: bool) -> OpenStep:
        with self._judging(), contextlib.ExitStack() as stack:
            folder = stack.enter_context(self._pinned(step))
            manifest = (self._checked_manifest if check_files else load_manifest)(folder, step)
            # A lock of its own: it is given before the other one ends.
            lock = self._open(folder / COMMIT)
            if not try_lock(lock, fcntl.LOCK_SH):
                lock.close()
                raise StepNotFound(f"{self.path}: step {step} is just being deleted")
            return OpenStep(folder, manifest, lock)

    def _restore(self, step: int, abstract: PyTree) -> Restored:
        with self._judging(), self._pinned(step) as folder:
            manifest = self._checked_manifest(folder, step)
            stored = {name: record.stored for name, record in manifest.arrays.items()}
            tree = fill(abstract, stored, _VerifiedReads(folder, manifest))
            return Restored(step, tree, dict(manifest.metadata))

    def _checked_manifest(self, folder: Path, step: int) -> Manifest:
        manifest = load_manifest(folder, step)
        if problems := [*file_problems(folder, manifest)]:
            raise CorruptStep(step, problems)
        return manifest

    def _check_never_used(self) -> None:
        if self.steps() or not quarantine.is_empty(self._layout):
            raise NoGoodStep(
                f"{self.path}: no checkpoint is whole; what is left of them is in "
                f"{self._layout.steps} and {self._layout.quarantine}. To start from scratch, "
                "use another folder or move this one away"
            )

    def _on_corrupt(self, error: CorruptStep) -> CorruptStep:
        logger.error("%s: %s; it is skipped", self.path, error)
        return error

    @contextlib.contextmanager
    def _judging(self) -> Iterator[None]:
        # Outside of `_pinned`: what is to be moved must not be held.
        try:
            yield
        except CorruptStep as error:
            raise self._on_corrupt(error) from error.__cause__

    def _open(self, path: Path) -> BinaryIO:
        try:
            return path.open("rb")
        except OSError as error:
            raise StoreUnreadable(f"{path} cannot be opened: {error}") from error

    @contextlib.contextmanager
    def _pinned(self, step: int) -> Iterator[Path]:
        folder = self._layout.step(step)
        if not folder.is_dir():
            raise StepNotFound(f"{self.path} has no step {step}; there are {self.steps()}")
        deleted = StepNotFound(f"{self.path}: step {step} is just being deleted")
        with contextlib.ExitStack() as stack:
            if (folder / COMMIT).is_file():
                try:
                    file = stack.enter_context(self._open(folder / COMMIT))
                except StoreUnreadable:
                    if folder.is_dir():
                        raise
                    raise deleted from None
                if not try_lock(file, fcntl.LOCK_SH) or not _is_same(file, folder / COMMIT):
                    raise deleted
            elif not folder.is_dir():  # Folders leave whole, so it was there a moment ago.
                raise deleted
            # Else it has no commit record, so it is corrupt, and nobody deletes that.
            yield folder


class _VerifiedReads:
    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self._reader = ArrayReader(folder / ARRAYS)
        self._manifest = manifest

    def __call__(self, name: str) -> HostArray:
        try:
            return read_array(self._reader, name, self._manifest.arrays[name])
        except StoreUnreadable:
            raise
        except ValueError as error:
            problem = Problem(f"array {name}", str(error))
            raise CorruptStep(self._manifest.step, [problem]) from error


def try_lock(file: BinaryIO, operation: int) -> bool:
    """Locks a file without waiting; False if another one's lock is in the way.

    The lock ends with the file object, or with the process.
    """
    try:
        fcntl.flock(file, operation | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise StoreUnreadable(f"{file.name} cannot be locked: {error}") from error
    return True


def _is_same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
