"""A new store around arrays that lie in files already."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from checkpoint.store.durable import Deadline, fsync_path
from checkpoint.store.layout import COMMIT, MANIFEST, StoreLayout
from checkpoint.store.manifest import ArrayRecord, FileRecord
from checkpoint.store.saving import commit_staged
from checkpoint.store.store import Store

TIMEOUT_S = 24 * 3600.0


def found_store(
    root: Path,
    step: int,
    staged: Path,
    records: Mapping[str, ArrayRecord],
    files: Mapping[str, FileRecord],
    metadata: Mapping[str, Any],
) -> None:
    """Make a store that holds one step. Nobody else may know `root` yet.

    Args:
        root: the new store's folder; may be there, without steps, from an interrupted call.
        step: the step's number.
        staged: on the same file system; holds the array files in `arrays`, see `ArrayFiles`,
            and becomes the step's folder in one rename.
        records: what the arrays are. The caller has read them back, part by part: a whole
            one need not fit into memory.
        files: what is known of files of `staged`, by path; the caller has read them back. The
            others are read.
        metadata: JSON values to keep with the step.

    Raises:
        OSError: the system refuses.
    """
    with Store(root) as store:
        epoch = store.epoch
    for name in (MANIFEST, COMMIT):
        (staged / name).unlink(missing_ok=True)
    commit_staged(
        *(staged, step, epoch, records, metadata, Deadline(TIMEOUT_S)),
        read_back=False,
        known_files=files,
    )
    layout = StoreLayout(root.absolute())
    staged.rename(layout.step(step))
    fsync_path(layout.steps)
