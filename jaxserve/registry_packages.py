"""Packages of registries, fetched by the registry's own client and checked by digest."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import tarfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from jaxserve.errors import JaxserveError


class FetchError(JaxserveError):
    """A package that could not be fetched; the message holds the way out."""


@dataclass(frozen=True, slots=True)
class NpmPackage:
    """A package of the npm registry: `spec` is name@version, `sha256` its tarball's."""

    spec: str
    sha256: str

    @property
    def label(self) -> str:
        return f"npm {self.spec}"

    def unpack(self, folder: Path, archive: Path | None = None) -> Path:
        """Fetches into `folder`; returns the folder of the package's files.

        Args:
            folder: an empty one.
            archive: the tarball, if it was fetched before.

        Raises FetchError: no npm, no network, another digest.
        """
        if archive is None:
            run_client(["npm", "pack", "--silent", self.spec], folder)
            archive = _only(folder.glob("*.tgz"), self.label)
        _check_digest(archive, self.sha256, self.label)
        with tarfile.open(archive) as tar:
            tar.extractall(folder / "unpacked", filter="data")
        return folder / "unpacked" / "package"


@dataclass(frozen=True, slots=True)
class AptPackage:
    """A package of Debian; `sha256` is that of the .deb file."""

    name: str
    version: str
    sha256: str

    @property
    def label(self) -> str:
        return f"Debian {self.name} {self.version}"

    def unpack(self, folder: Path, archive: Path | None = None) -> Path:
        """Fetches into `folder`; returns the folder of the package's files.

        Args:
            folder: an empty one.
            archive: the .deb file, if it was fetched before.

        Raises FetchError: no apt-get, no such version there, another digest.
        """
        if archive is None:
            run_client(["apt-get", "--quiet=2", "download", f"{self.name}={self.version}"], folder)
            archive = _only(folder.glob("*.deb"), self.label)
        _check_digest(archive, self.sha256, self.label)
        run_client(["dpkg-deb", "--extract", str(archive.absolute()), "unpacked"], folder)
        return folder / "unpacked"


def run_client(command: list[str], folder: Path) -> None:
    """Runs a registry's client in `folder`. Raises FetchError: not installed, or it failed."""
    if shutil.which(command[0]) is None:
        raise FetchError(f"{command[0]} is needed to fetch this and is not installed")
    done = subprocess.run(  # noqa: S603 -- a registry client, with our own arguments
        command, cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = (done.stderr.strip() or done.stdout.strip() or "no reason given")[-500:]
        raise FetchError(f"`{' '.join(command)}` failed: {reason}")


def _only(files: Iterable[Path], label: str) -> Path:
    found = list(files)
    if len(found) != 1:
        raise FetchError(f"{label}: one archive was expected, {len(found)} came")
    return found[0]


def _check_digest(archive: Path, expected: str, label: str) -> None:
    with archive.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != expected:
        raise FetchError(f"{label} has SHA-256 {digest}, not {expected}: it is not what was pinned")
