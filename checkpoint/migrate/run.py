"""A migration: plan -> stream -> verify -> publish."""

from __future__ import annotations

import dataclasses
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.migrate.errors import WriteFailed
from checkpoint.migrate.journal import Journal
from checkpoint.migrate.manifest import (
    IN_FOLDER,
    MigrationManifest,
    describe_files,
    file_problems,
    load_manifest,
    manifest_path,
)
from checkpoint.migrate.parts import PartSource
from checkpoint.migrate.plan import Plan, max_in_flight
from checkpoint.migrate.publish import check_free, publish_file, publish_folder, write_beside
from checkpoint.migrate.read_back import ReadBack
from checkpoint.migrate.stream import stream
from checkpoint.migrate.target import FileDigests, FileLayout, FileTarget, StoreTarget
from checkpoint.migrate.workspace import Workspace, workspace_path
from checkpoint.store.durable import Deadline, fsync_tree, write_new_file
from checkpoint.store.founding import found_store
from checkpoint.store.layout import StoreLayout
from checkpoint.store.manifest import ArrayRecord, FileRecord

FSYNC_TIMEOUT_S = 24 * 3600.0
BYTES_A_KIB = 1024
CHECKPOINTS = "checkpoints"


@dataclass(frozen=True)
class OnProgress:
    """What a migration tells while it runs.

    Attributes:
        window: `(num_bytes, written)` of the target are done.
        phase: what begins now.
    """

    window: Callable[[int, bool], None] = lambda _bytes, _written: None
    phase: Callable[[str], None] = lambda _name: None


@dataclass(frozen=True)
class StepTarget:
    """The target is a step of a store in a model folder.

    Attributes:
        step: its number.
        metadata: kept with it.
        key_impls: for arrays that are keys of a random generator: its name.
    """

    step: int
    metadata: Mapping[str, Any]
    key_impls: Mapping[str, str | None]


@dataclass(frozen=True)
class Migration:
    """Everything that a migration needs.

    Attributes:
        plan: what to make.
        source: where the values come from.
        source_id: identifies the source without reading it, see `Workspace`.
        source_record: what the manifest says of the source.
        target: the path to publish.
        form: the layouts of files, or a step.
        carried: other files of the target's folder, by relative path.
        single_file: the target is a file: its name in `form`; None for a folder.
        tool: name and version of the program.
        check: called with the finished folder or file before it is published; may raise.
    """

    plan: Plan
    source: PartSource
    source_id: Mapping[str, Any]
    source_record: Mapping[str, Any]
    target: Path
    form: tuple[FileLayout, ...] | StepTarget
    carried: Mapping[str, bytes]
    single_file: str | None
    tool: str
    check: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Limits:
    """What a migration may use.

    Attributes:
        num_workers: threads that read.
        memory_bytes: of the whole process; None for windows of the plan's size without limit.
        force: replace what is at the target.
        restart: throw an unfinished migration away.
        read_back: how much of what is written is read again.
    """

    num_workers: int
    memory_bytes: int | None
    force: bool = False
    restart: bool = False
    read_back: ReadBack = ReadBack.ENDS


def migrate(migration: Migration, limits: Limits, progress: OnProgress) -> MigrationManifest:
    """Do it, or go on with what an interrupted call has left.

    Raises:
        MigrationError: refused or given up; what was done is kept for the next call.
        FormatError, StoreError: the source is not what it should be.
    """
    finished = _finished_before(migration)
    if finished is not None:
        return finished
    check_free(migration.target, force=limits.force)
    plan = migration.plan
    in_flight = limits.num_workers + 2
    if limits.memory_bytes is not None:
        free_bytes = limits.memory_bytes - peak_memory_bytes()
        in_flight = max_in_flight(plan, migration.source, limits.num_workers, free_bytes)
    try:
        with Workspace(
            *(migration.target, plan.digest, migration.source_id),
            window_bytes=plan.window_bytes,
            restart=limits.restart,
        ) as space:
            target = _open_target(migration, space.out)
            try:
                progress.phase("stream")
                with Journal(space.journal) as journal:
                    digests = stream(
                        *(plan, migration.source, target, journal),
                        num_workers=limits.num_workers,
                        max_in_flight=in_flight,
                        read_back=limits.read_back,
                        on_window=progress.window,
                    )
                files = target.finish()
            finally:
                target.close()
            progress.phase("publish")
            manifest = _complete(migration, space.out, digests, files)
            _publish(migration, space, manifest, force=limits.force)
            return manifest
    except OSError as error:
        raise WriteFailed(
            f"{error}. What is done is kept: run the same command again once that is mended"
        ) from error


def peak_memory_bytes() -> int:
    """The most memory that this process has held so far."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not ru_maxrss: on Linux a new program inherits that of the one that started it.
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "VmHWM" in fields:
            return int(fields["VmHWM"].split()[0]) * BYTES_A_KIB
    unit = 1 if sys.platform == "darwin" else BYTES_A_KIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _finished_before(migration: Migration) -> MigrationManifest | None:
    """The manifest, if a call that was killed had published the target and not yet cleared up."""
    target, workspace = migration.target, workspace_path(migration.target)
    if not workspace.is_dir() or not target.exists():
        return None
    manifest = load_manifest(target)
    if manifest is None or manifest.plan_sha256 != migration.plan.digest:
        return None
    if Workspace.recorded_source(workspace) != dict(migration.source_id):
        return None
    settled = dataclasses.replace(manifest, replaces=None)
    if file_problems(target, settled):
        return None
    if manifest.replaces is not None:
        write_beside(manifest_path(target), settled)
    shutil.rmtree(workspace)
    return settled


def _open_target(migration: Migration, out: Path) -> FileTarget | StoreTarget:
    if isinstance(migration.form, tuple):
        return FileTarget(out, migration.form)
    committed = StoreLayout(out / CHECKPOINTS).step(migration.form.step)
    is_committed = committed.is_dir()
    folder = committed if is_committed else _staged_step(out, migration.form)
    return StoreTarget(folder, migration.plan, migration.source, is_committed=is_committed)


def _complete(
    migration: Migration, out: Path, digests: Mapping[str, str], files: FileDigests
) -> MigrationManifest:
    """Carried files, the step's commit, the manifest: all on the disk when it returns."""
    for name, content in migration.carried.items():
        path = out / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    made = {} if isinstance(migration.form, StepTarget) else files
    if isinstance(migration.form, StepTarget):
        _commit_step(migration, out, migration.form, digests, files)
    (out / IN_FOLDER).unlink(missing_ok=True)
    others = describe_files(out, exclude=(CHECKPOINTS, *made))
    manifest = MigrationManifest(
        files={**others, **made},
        arrays=digests,
        source=migration.source_record,
        plan_sha256=migration.plan.digest,
        tool=migration.tool,
    )
    if migration.single_file is None:
        write_new_file(out / IN_FOLDER, manifest.encode())
    fsync_tree(out, Deadline(FSYNC_TIMEOUT_S))
    return manifest


def _publish(
    migration: Migration, space: Workspace, manifest: MigrationManifest, *, force: bool
) -> None:
    made = space.out / (migration.single_file or "")
    if migration.check is not None:
        migration.check(made)
    if migration.single_file is None:
        publish_folder(made, migration.target, force=force)
    else:
        entry = manifest.files[migration.single_file]
        beside = dataclasses.replace(manifest, files={migration.target.name: entry})
        publish_file(made, migration.target, beside, force=force)
    space.remove()


def _staged_step(out: Path, form: StepTarget) -> Path:
    return out / f"step-{form.step}"


def _commit_step(
    migration: Migration,
    out: Path,
    form: StepTarget,
    digests: Mapping[str, str],
    files: FileDigests,
) -> None:
    staged = _staged_step(out, form)
    if StoreLayout(out / CHECKPOINTS).step(form.step).is_dir():
        return  # An interrupted call has come thus far.
    records = {
        array.name: ArrayRecord(
            array.shape, array.dtype, digests[array.name], form.key_impls.get(array.name)
        )
        for array in migration.plan.arrays
    }
    known = {path: FileRecord(*described) for path, described in files.items()}
    found_store(out / CHECKPOINTS, form.step, staged, records, known, form.metadata)
