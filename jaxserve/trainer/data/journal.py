"""Journal: how far an unfinished preparation has come, so that it can go on after a kill."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from jaxserve.trainer.data.blocks import Position
from jaxserve.trainer.data.errors import DataError
from jaxserve.trainer.data.token_files import SplitSizes

PLAN_NAME = "plan.json"
JOURNAL_NAME = "journal.json"


@dataclass(frozen=True, slots=True)
class Journal:
    """What is on the disk for sure.

    Attributes:
        position: everything before it is in the split's files.
        num_documents: begun so far, over both splits, those left out included.
        sizes: of each split's files; what lies beyond is cut off.
        counts: records left out or cut, by reason.
        source_sha256: digests of the sources that are done.
    """

    position: Position = field(default_factory=Position)
    num_documents: int = 0
    sizes: Mapping[str, SplitSizes] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    source_sha256: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Replaces the journal, durably and whole."""
        write_durably(folder / JOURNAL_NAME, asdict(self))


def read_journal(folder: Path) -> Journal:
    """The journal of `folder`; an empty one when nothing is done yet."""
    path = folder / JOURNAL_NAME
    if not path.is_file():
        return Journal()
    fields = json.loads(path.read_bytes())
    return Journal(
        position=Position(**fields["position"]),
        num_documents=fields["num_documents"],
        sizes={name: SplitSizes(**sizes) for name, sizes in fields["sizes"].items()},
        counts=fields["counts"],
        source_sha256=tuple(fields["source_sha256"]),
    )


def check_plan(folder: Path, plan: Mapping[str, Any]) -> None:
    """Raises DataError, which names the difference, if the unfinished work in `folder` was
    begun with another plan than `plan`."""
    found = json.loads((folder / PLAN_NAME).read_bytes())
    different = [name for name in plan if found.get(name) != json.loads(json.dumps(plan[name]))]
    if different:
        name = different[0]
        raise DataError(
            f"{folder} holds unfinished work with another {name} (then {found.get(name)!r}, now "
            f"{plan[name]!r}); give the same command to go on, or --force to begin anew"
        )


def write_durably(path: Path, value: Any) -> None:
    """Replaces a JSON file so that a crash leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(json.dumps(value, indent=1, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Forces a folder's list of names to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
