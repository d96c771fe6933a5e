"""The store: saves in the background, fenced, and restores only what it has verified."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from checkpoint.store import quarantine
from checkpoint.store.durable import Deadline, canonical_json
from checkpoint.store.errors import (
    CorruptStep,
    Fenced,
    SaveFailed,
    StepExists,
    StoreError,
    UnsupportedLeaf,
)
from checkpoint.store.identity import ProcessIdentity
from checkpoint.store.layout import COMMIT, MAX_STEP, StoreLayout
from checkpoint.store.lease import Lease
from checkpoint.store.reader import StoreReader, try_lock
from checkpoint.store.retention import RetentionPolicy, steps_to_delete
from checkpoint.store.saving import SaveHandle, SaveTask
from checkpoint.store.tree import PyTree, to_host
from checkpoint.store.verification import load_manifest

logger = logging.getLogger(__name__)

CLOSE_GRACE_S = 10.0


@dataclass(frozen=True)
class StoreOptions:
    """How a store is written.

    Attributes:
        retention: which steps are kept.
        layer_stacks: an array with one of these names on its path has the layers as its
            first axis and is stored in one chunk per layer.
        save_timeout_s: when a save is given up.
        read_back: read every array again from the files before a save is committed.
        lease_ttl_s: for how long other machines let this writer be silent.
        lease_wait_s: how long to wait for another writer to end.
        take_over: fence another writer, even one that lives.
    """

    retention: RetentionPolicy = field(default_factory=RetentionPolicy)
    layer_stacks: tuple[str, ...] = ("layers",)
    save_timeout_s: float = 1800.0
    read_back: bool = True
    lease_ttl_s: float = 10.0
    lease_wait_s: float = 0.0
    take_over: bool = False

    def __post_init__(self) -> None:
        if self.save_timeout_s <= 0 or self.lease_ttl_s <= 0:
            raise StoreError(
                f"save_timeout_s={self.save_timeout_s:g}, lease_ttl_s={self.lease_ttl_s:g}: "
                "both must be above 0"
            )


class Store(StoreReader):
    """The writer of a store; a context manager.

    One process writes: on a host, in a whole cluster. In a `jax.distributed` job that is
    process 0, or better a process outside of it, with the arrays gathered there.

    Attributes:
        num_failed_saves: since it was opened.
    """

    def __init__(
        self,
        path: str | Path,
        options: StoreOptions | None = None,
        *,
        holder: ProcessIdentity | None = None,
    ) -> None:
        """Opens a store for writing, and makes it if it is not there.

        What dead writers left half-written is deleted.

        Args:
            path: its folder.
            options: see there.
            holder: this process, by default as the system knows it.

        Raises:
            LeaseHeld: another writer has it.
        """
        layout = StoreLayout(Path(path).absolute())
        for folder in layout.folders:
            folder.mkdir(parents=True, exist_ok=True)
        super().__init__(path)
        self.num_failed_saves = 0
        self._options = options or StoreOptions()
        self._current: tuple[SaveHandle, threading.Thread] | None = None
        self._unseen: list[SaveHandle] = []
        self._last_good: int | None = None
        self._metrics: dict[int, float | None] = {}
        self._lease = Lease.acquire(
            layout,
            holder or ProcessIdentity.current(),
            ttl_s=self._options.lease_ttl_s,
            wait_s=self._options.lease_wait_s,
            take_over=self._options.take_over,
        )

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:  # What is on its way out says more than a failed save.
            with contextlib.suppress(SaveFailed):
                self.close()

    @property
    def epoch(self) -> int:
        """This writer's number; each new writer of a store has a higher one."""
        return self._lease.epoch

    def check_lease(self) -> None:
        """Raises Fenced when a newer writer has the store."""
        self._lease.check()

    def save(
        self, step: int, tree: PyTree, metadata: Mapping[str, Any] | None = None
    ) -> SaveHandle:
        """Saves `tree` as `step`. All values are copied before it returns.

        A save that still runs is waited for first.

        Args:
            step: higher than all in the store.
            tree: arrays, numbers and PRNG keys in any pytree. `jax.Array`s must be
                addressable from this process.
            metadata: JSON values to keep with it; `{"metrics": {NAME: number}}` is what
                retention by the best metric looks at.

        Returns:
            The handle; the step is a checkpoint once its `wait` has returned.

        Raises:
            Fenced: another writer has the store.
            StepExists: `step` is not the newest.
            UnsupportedLeaf: `tree` holds something that cannot be stored.
        """
        self._finish_current()
        self._lease.check()
        self._check_step(step)
        kept = dict(metadata or {})
        try:
            canonical_json(kept)
        except (TypeError, ValueError) as error:
            raise UnsupportedLeaf(f"metadata must consist of JSON values: {error}") from error
        deadline = Deadline(self._options.save_timeout_s)
        leaves = to_host(tree)
        stacks = set(self._options.layer_stacks)
        stacked = {
            name
            for name, leaf in leaves.items()
            if leaf.array.ndim and stacks.intersection(name.split("/"))
        }
        task = SaveTask(
            self._layout,
            self._lease.gate,
            step,
            leaves,
            stacked,
            kept,
            self._options.read_back,
            deadline,
        )
        handle = SaveHandle(step, deadline)
        thread = threading.Thread(
            target=self._run, args=(task, handle), name=f"checkpoint-save-{step}", daemon=True
        )
        self._current = (handle, thread)
        self._unseen = [*(old for old in self._unseen if old.has_unseen_error), handle]
        thread.start()
        return handle

    def set_aside_after(self, step: int, reason: str) -> list[int]:
        """Moves all newer steps to quarantine, as before a rollback.

        Returns:
            The steps moved.

        Raises:
            Fenced: another writer has the store.
        """
        self._finish_current()
        self._lease.check()
        newer = [later for later in self.steps() if later > step]
        for later in newer:
            quarantine.move_aside(self._layout, self._lease.gate, later, [reason])
        return newer

    def latest_good(self) -> int | None:
        """As `StoreReader.latest_good`; corrupt steps go to quarantine."""
        step = super().latest_good()
        self._last_good = step
        return step

    def close(self) -> None:
        """Waits for a running save and gives the store back.

        Raises:
            SaveFailed: a save failed and nobody has asked its handle.
        """
        try:
            self._finish_current()
        finally:
            self._lease.release()
        for handle in self._unseen:
            if handle.has_unseen_error:
                handle.wait()

    def _run(self, task: SaveTask, handle: SaveHandle) -> None:
        try:
            task.run(handle.begin_publishing)
        except BaseException as error:
            self.num_failed_saves += 1
            logger.error("%s: %s", self.path, error)
            handle.settle(error)
            return
        if task.read_back:
            self._last_good = task.step
        handle.settle(None)
        try:
            self._retain()
        except (StoreError, OSError) as error:
            logger.warning("%s: old steps could not be deleted: %s", self.path, error)

    def _finish_current(self) -> None:
        if self._current is not None:
            handle, thread = self._current
            handle.wait_until_over()
            thread.join(timeout=CLOSE_GRACE_S)
            self._current = None

    def _check_step(self, step: int) -> None:
        if not 0 <= step <= MAX_STEP:
            raise StoreError(f"step {step} is not between 0 and {MAX_STEP}")
        newest = max(self.steps(), default=-1)
        if step <= newest:
            self._lease.check()  # If the newer step is another writer's, that is the reason.
            raise StepExists(
                f"{self.path}: step {step} cannot be saved, step {newest} is there already. "
                f"To go back, call set_aside_after({step - 1}, reason) first"
            )

    def _retain(self) -> None:
        steps = self.steps()
        self._metrics = {
            step: self._metrics[step] if step in self._metrics else self._metric(step)
            for step in steps
            if step in self._metrics or self._has_manifest(step)
        }
        protected = {*steps[-1:], *([] if self._last_good is None else [self._last_good])}
        for step in steps_to_delete(self._options.retention, self._metrics, protected):
            self._delete_unless_read(step)

    def _has_manifest(self, step: int) -> bool:
        # What cannot be read is never deleted: it is for `latest_good` to judge.
        with contextlib.suppress(StoreError):
            load_manifest(self._layout.step(step), step)
            return True
        return False

    def _metric(self, step: int) -> float | None:
        metrics = load_manifest(self._layout.step(step), step).metadata.get("metrics")
        value = metrics.get(self._options.retention.best_metric) if metrics else None
        return float(value) if isinstance(value, int | float) else None

    def _delete_unless_read(self, step: int) -> None:
        folder = self._layout.step(step)
        with (folder / COMMIT).open("rb") as file:
            if try_lock(file, fcntl.LOCK_EX):
                self._lease.gate.delete(folder)
                logger.info("%s: step %d is deleted", self.path, step)
            else:
                logger.info("%s: step %d is being read and stays for now", self.path, step)

    def _on_corrupt(self, error: CorruptStep) -> CorruptStep:
        reasons = [str(problem) for problem in error.problems]
        try:
            self._lease.check()
            target = quarantine.move_aside(self._layout, self._lease.gate, error.step, reasons)
        except (Fenced, FileNotFoundError):
            return super()._on_corrupt(error)
        moved = CorruptStep(error.step, error.problems, f". It was moved to {target}")
        logger.error("%s: %s", self.path, moved)
        return moved
