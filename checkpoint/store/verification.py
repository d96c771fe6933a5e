"""Whether a stored step is what was saved. Uses BLAKE3 and TensorStore, not Orbax."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from checkpoint.store.commit import CommitRecord
from checkpoint.store.digests import blake3_of_file
from checkpoint.store.durable import sha256_hex, walk_files
from checkpoint.store.errors import CorruptStep, Problem, StoreError, StoreUnreadable
from checkpoint.store.layout import ARRAYS, COMMIT, MANIFEST
from checkpoint.store.manifest import ArrayRecord, FileRecord, Manifest
from checkpoint.store.orbax_io import ArrayReader
from checkpoint.store.tree import DTYPES, HostArray, digest

T = TypeVar("T")

MANY_BYTES = 64 << 20
"""Files of more are read by several threads."""
NUM_TRIES = 2
"""A read that fails is done again: a glitch must not send a good step to quarantine."""

_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO, errno.EUCLEAN)
"""Errors that speak of the files themselves; others speak of this process or system."""


@dataclass(frozen=True)
class VerifyReport:
    """The result of a full check.

    Attributes:
        step: the step.
        problems: what is wrong; empty when every file and array is as it was saved.
        num_files, num_arrays: how many were checked.
        size_bytes: of the files.
    """

    step: int
    problems: tuple[Problem, ...]
    num_files: int = 0
    num_arrays: int = 0
    size_bytes: int = 0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems


def load_manifest(folder: Path, step: int) -> Manifest:
    """The manifest, held against the commit record, and that against itself.

    Raises:
        CorruptStep: either is damaged, missing, or of another step.
        StoreUnreadable: the system refuses to read.
    """
    commit = _decode(folder, COMMIT, step, CommitRecord.decode)
    if commit.step != step:
        raise CorruptStep(step, [Problem(COMMIT, f"is of step {commit.step}")])
    data = _read_bytes(folder, MANIFEST, step)
    if sha256_hex(data) != commit.manifest_sha256:
        raise CorruptStep(step, [Problem(MANIFEST, "is not the one that was committed")])
    manifest = _decode(folder, MANIFEST, step, Manifest.decode)
    if manifest.step != step:
        raise CorruptStep(step, [Problem(MANIFEST, f"is of step {manifest.step}")])
    return manifest


def file_problems(folder: Path, manifest: Manifest) -> Iterator[Problem]:
    """Files that are missing, extra, of another size or of other content.

    Raises:
        StoreUnreadable: the system refuses to read.
    """
    try:
        found = _tried(lambda: dict(walk_files(folder)))
    except OSError as error:
        yield Problem(".", f"cannot be listed: {error}")
        return
    for own in (COMMIT, MANIFEST):
        found.pop(own, None)
    for path in sorted(found.keys() - manifest.files.keys()):
        yield Problem(path, "does not belong here")
    whole = {path: record for path, record in manifest.files.items() if found.get(path)}
    for path in sorted(manifest.files.keys() - whole.keys()):
        yield Problem(path, "is not a plain file" if path in found else "is missing")
    if sum(record.size_bytes for record in whole.values()) < MANY_BYTES:
        for path, record in whole.items():
            yield from _content_problems(folder, path, record)
        return
    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "verify-files") as pool:
        for problems in pool.map(partial(_content_problems, folder), whole, whole.values()):
            yield from problems


def read_array(reader: ArrayReader, name: str, record: ArrayRecord) -> HostArray:
    """The values of one array, after their digest was found right.

    Raises:
        ValueError: they are not those that were saved.
        StoreUnreadable: the system refuses to read.
    """
    if 0 in record.shape:
        return np.empty(record.shape, DTYPES[record.dtype])
    failure: Exception | None = None
    for _ in range(NUM_TRIES):
        try:
            array = reader.read(name)
        except StoreUnreadable:
            raise
        except (ValueError, OSError) as error:
            failure = ValueError(f"cannot be read: {error}")
            continue
        if digest(array) == record.blake3:
            return array
        failure = ValueError(f"its values are not those saved (BLAKE3 {record.blake3[:12]}...)")
    assert failure is not None
    raise failure


def verify_folder(folder: Path, step: int) -> VerifyReport:
    """Checks the commit record, the manifest, every file and every array.

    Raises:
        StoreUnreadable: the system refuses to read.
    """
    try:
        manifest = load_manifest(folder, step)
    except CorruptStep as error:
        return VerifyReport(step, error.problems)
    problems = [*file_problems(folder, manifest)]
    reader = ArrayReader(folder / ARRAYS)
    for name, record in manifest.arrays.items():
        try:
            read_array(reader, name, record)
        except StoreUnreadable:
            raise
        except ValueError as error:
            problems.append(Problem(f"array {name}", str(error)))
    size_bytes = sum(record.size_bytes for record in manifest.files.values())
    return VerifyReport(
        step, tuple(problems), len(manifest.files), len(manifest.arrays), size_bytes
    )


def _content_problems(folder: Path, path: str, record: FileRecord) -> list[Problem]:
    try:
        found_bytes = _tried(lambda: (folder / path).stat().st_size)
        if found_bytes != record.size_bytes:
            text = f"has {found_bytes} bytes, {record.size_bytes} were written"
            return [Problem(path, text)]
        if _tried(lambda: blake3_of_file(folder / path)) != record.blake3:
            return [Problem(path, "its bytes are not those written")]
    except OSError as error:
        return [Problem(path, f"cannot be read: {os.strerror(error.errno or 0)}")]
    return []


def _read_bytes(folder: Path, name: str, step: int) -> bytes:
    path = folder / name
    if path.is_symlink() or not path.is_file():
        what = "is not a plain file" if path.is_symlink() or path.exists() else "is missing"
        raise CorruptStep(step, [Problem(name, what)])
    try:
        return _tried(path.read_bytes)
    except OSError as error:
        text = f"cannot be read: {os.strerror(error.errno or 0)}"
        raise CorruptStep(step, [Problem(name, text)]) from error


def _decode(folder: Path, name: str, step: int, decode: Callable[[bytes], T]) -> T:
    try:
        return decode(_read_bytes(folder, name, step))
    except StoreError:
        raise
    except ValueError as error:
        raise CorruptStep(step, [Problem(name, str(error))]) from error


def _tried(read: Callable[[], T]) -> T:
    for attempt in range(1, NUM_TRIES + 1):
        try:
            return read()
        except OSError as error:
            if error.errno not in _DAMAGE:
                raise StoreUnreadable(
                    f"{error}. This is no damage to the checkpoint: mend it and try again"
                ) from error
            if attempt == NUM_TRIES:
                raise
    raise AssertionError("unreachable")
