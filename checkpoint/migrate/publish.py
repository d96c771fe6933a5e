"""Publish: the finished target appears at its path whole, in one step of the file system."""

from __future__ import annotations

import ctypes
import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

from checkpoint.migrate.errors import MigrationError, TargetExists
from checkpoint.migrate.manifest import MigrationManifest, load_manifest, manifest_path
from checkpoint.store.digests import blake3_of_file
from checkpoint.store.durable import fsync_path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_free(target: Path, *, force: bool) -> None:
    """Raises TargetExists if something is at `target` and may not be replaced."""
    if (target.exists() or target.is_symlink()) and not force:
        raise TargetExists(f"{target} exists; pass --force to replace it, or give another path")
    if target.is_symlink():
        raise TargetExists(
            f"{target} is a link, which is never replaced; give the path it leads to"
        )


def publish_folder(out: Path, target: Path, *, force: bool) -> None:
    """Move the folder `out`, all of it on the disk, to `target`.

    A reader finds the old folder or the new one, never a mixture; the old one is deleted.

    Raises:
        TargetExists: without `force`, something is there.
        MigrationError: the file system cannot swap two folders.
    """
    check_free(target, force=force)
    if not target.exists():
        out.rename(target)
    elif not target.is_dir():
        raise TargetExists(f"{target} is a file, and the new one is a folder; move it away first")
    else:
        _exchange(out, target)
        shutil.rmtree(out)
    fsync_path(target.parent)


def publish_file(out: Path, target: Path, manifest: MigrationManifest, *, force: bool) -> None:
    """Move the file `out`, all of it on the disk, to `target`, and its manifest beside it.

    At any moment the file that is at `target` is one that the manifest beside it vouches for.

    Raises:
        TargetExists: without `force`, something is there; or it is a folder.
    """
    check_free(target, force=force)
    if target.is_dir():
        raise TargetExists(f"{target} is a folder, and the new one is a file; move it away first")
    beside = manifest_path(target)
    if target.exists():
        old = load_manifest(target)
        files = old.files if old is not None else _described(target)
        write_beside(beside, replace(manifest, replaces=files))
        out.replace(target)
        fsync_path(target.parent)
        write_beside(beside, manifest)
        return
    write_beside(beside, manifest)
    try:
        os.link(out, target)  # Unlike a rename it fails when something is there by now.
    except FileExistsError:
        raise TargetExists(f"{target} has appeared meanwhile; pass --force to replace it") from None
    fsync_path(target.parent)


def _described(target: Path) -> dict[str, tuple[int, str]]:
    return {target.name: (target.stat().st_size, blake3_of_file(target))}


def write_beside(path: Path, manifest: MigrationManifest) -> None:
    """Put a manifest at `path`, in place of the one there."""
    staged = path.with_name(f".{path.name}.new")
    staged.write_bytes(manifest.encode())
    fsync_path(staged)
    staged.replace(path)
    fsync_path(path.parent)


def _exchange(first: Path, second: Path) -> None:
    library = ctypes.CDLL(None, use_errno=True)
    result = library.renameat2(
        *(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE)
    )
    if result == 0:
        return
    number = ctypes.get_errno()
    if number in (errno.ENOSYS, errno.EINVAL):
        raise MigrationError(
            f"the file system of {second} cannot swap two folders; move the old one away and run "
            "the same command again without --force: what is done is kept"
        )
    raise OSError(number, os.strerror(number), os.fspath(second))
