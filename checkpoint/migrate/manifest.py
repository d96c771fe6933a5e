"""The manifest of a migrated model: its files and arrays with their digests, and its source.

In a folder it is `jaxserve-manifest.json`; beside a file `NAME.manifest.json`. While a file
is being replaced its manifest vouches for the old one, too (`replaces`), so that whichever is
there verifies.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.errors import FormatError
from checkpoint.store.digests import blake3_of_file
from checkpoint.store.durable import canonical_json, sha256_hex, walk_files

FORMAT = "jaxserve-manifest-2"
DIGESTS = "blake3"
IN_FOLDER = "jaxserve-manifest.json"
MAX_BYTES = 256 << 20
BELIEVED = (".safetensors", ".index.json", "config.json", "tokenizer.json", ".jinja")


@dataclass(frozen=True)
class MigrationManifest:
    """What was made, and from what.

    Attributes:
        files: size in bytes and BLAKE3, by path relative to the target's folder.
        arrays: BLAKE3 of each array, see docs/checkpoints.md.
        source: path, format and digests of what it was made from.
        plan_sha256: of the plan.
        tool: name and version of the program.
        replaces: files as they were before, while they are being replaced.
    """

    files: Mapping[str, tuple[int, str]]
    arrays: Mapping[str, str]
    source: Mapping[str, Any]
    plan_sha256: str
    tool: str
    replaces: Mapping[str, tuple[int, str]] | None = None

    @property
    def sha256(self) -> str:
        """SHA-256 of the manifest itself: names all that it describes."""
        return sha256_hex(self.encode())

    def encode(self) -> bytes:
        """The file's bytes; every one of them is covered by the digest in it."""
        fields = {
            "format": FORMAT,
            "digests": DIGESTS,
            "files": {name: list(entry) for name, entry in self.files.items()},
            "arrays": dict(self.arrays),
            "source": dict(self.source),
            "plan_sha256": self.plan_sha256,
            "tool": self.tool,
            "replaces": None
            if self.replaces is None
            else {name: list(entry) for name, entry in self.replaces.items()},
        }
        return canonical_json({**fields, "sha256": sha256_hex(canonical_json(fields))})

    @classmethod
    def decode(cls, data: bytes) -> MigrationManifest:
        """Reads what `encode` wrote. Raises FormatError on anything else."""
        try:
            fields = json.loads(data)
            kept = {name: value for name, value in fields.items() if name != "sha256"}
            whole = canonical_json({**kept, "sha256": sha256_hex(canonical_json(kept))})
            if whole != data:
                raise FormatError("the manifest is damaged: its digest does not match its content")
            if kept["format"] != FORMAT:
                raise FormatError(
                    f"the manifest has the format {kept['format']!r}, and this version reads "
                    f"{FORMAT!r}: use the version that wrote it, or a newer one"
                )
            return cls(
                _entries(kept["files"]),
                {str(name): str(blake3) for name, blake3 in kept["arrays"].items()},
                dict(kept["source"]),
                str(kept["plan_sha256"]),
                str(kept["tool"]),
                None if kept["replaces"] is None else _entries(kept["replaces"]),
            )
        except FormatError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise FormatError(f"the manifest is damaged: {error!r}") from error


def manifest_path(target: Path) -> Path:
    """Where the manifest of a file or a folder is."""
    if target.is_dir():
        return target / IN_FOLDER
    return target.with_name(f"{target.name}.manifest.json")


def load_manifest(target: Path) -> MigrationManifest | None:
    """The manifest of a file or a folder; None if there is none. Raises FormatError."""
    path = manifest_path(target)
    if not path.is_file():
        return None
    if path.stat().st_size > MAX_BYTES:
        raise FormatError(f"{path} is larger than {MAX_BYTES} bytes")
    return MigrationManifest.decode(path.read_bytes())


def file_problems(target: Path, manifest: MigrationManifest) -> list[str]:
    """What differs between the files and the manifest; one line each."""
    problems = _problems(target, manifest.files) + _strangers(target, manifest.files)
    if problems and manifest.replaces is not None:
        return [] if not _problems(target, manifest.replaces) else problems
    return problems


def describe_files(folder: Path, exclude: tuple[str, ...] = ()) -> dict[str, tuple[int, str]]:
    """Size and digest of every file below `folder`, but for those below the names `exclude`."""
    return {
        name: (size, blake3_of_file(folder / name))
        for name, _ in walk_files(folder)
        if name.split("/")[0] not in exclude
        for size in [(folder / name).stat().st_size]
    }


def _problems(target: Path, files: Mapping[str, tuple[int, str]]) -> list[str]:
    folder = target if target.is_dir() else target.parent
    problems = []
    for name, (num_bytes, blake3) in sorted(files.items()):
        path = folder / name
        if path.is_symlink() or not path.is_file():
            problems.append(f"{name}: is missing or not a plain file")
        elif path.stat().st_size != num_bytes:
            problems.append(f"{name}: has {path.stat().st_size} bytes, {num_bytes} were written")
        elif blake3_of_file(path) != blake3:
            problems.append(f"{name}: its bytes are not those written")
    return problems


def _strangers(target: Path, files: Mapping[str, tuple[int, str]]) -> list[str]:
    """Files that nobody vouches for and that a reader of the folder would believe."""
    if not target.is_dir():
        return []
    known = {*files, IN_FOLDER}
    return [
        f"{path.name}: does not belong here"
        for path in sorted(target.iterdir())
        if path.name.endswith(BELIEVED) and path.name not in known
    ]


def _entries(values: Mapping[str, Any]) -> dict[str, tuple[int, str]]:
    entries = {}
    for name, (num_bytes, blake3) in values.items():
        if name.startswith("/") or ".." in name.split("/"):
            raise FormatError(f"the manifest names {name!r}, which leads out of its folder")
        entries[str(name)] = (int(num_bytes), str(blake3))
    return entries
