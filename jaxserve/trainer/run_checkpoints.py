"""Durable checkpoints of a run: states in and out of `checkpoint.store`, by layout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from checkpoint.store import (
    CorruptStep,
    NoGoodStep,
    RetentionPolicy,
    SaveHandle,
    Store,
    StoreOptions,
)
from jaxserve.trainer.memory_file import Bytes
from jaxserve.trainer.state_layout import StateLayout

LAYOUT = "layout"


@dataclass(frozen=True)
class RestoredState:
    """A state from the disk.

    Attributes:
        step: the next step.
        state: its bytes, uint8[layout.size_bytes].
        layout: how they are laid out.
        skipped: newer checkpoints that were not what was saved; they are in quarantine.
    """

    step: int
    state: Bytes
    layout: StateLayout
    skipped: tuple[CorruptStep, ...]


@dataclass(frozen=True)
class SaveOutcome:
    """A save that is over.

    Attributes:
        step: its number.
        error: what went wrong; None: it is durable.
    """

    step: int
    error: BaseException | None


class RunCheckpoints:
    """The one writer of a run's checkpoints; holds the run's lease.

    Attributes:
        last_durable: next step of the newest checkpoint known to be whole; None: there is none.
        num_failed: saves that failed since it was opened.
    """

    def __init__(self, path: Path, retention: RetentionPolicy, *, take_over: bool) -> None:
        """Raises LeaseHeld: another process has the run."""
        self._store = Store(path, StoreOptions(retention=retention, take_over=take_over))
        self._handle: SaveHandle | None = None
        self.last_durable: int | None = None
        self.num_failed = 0

    @property
    def epoch(self) -> int:
        """Number of this writer."""
        return self._store.epoch

    @property
    def is_busy(self) -> bool:
        """Whether a save is under way, or over and not yet taken by `poll`."""
        return self._handle is not None

    def check_lease(self) -> None:
        """Raises Fenced when another writer has the run."""
        self._store.check_lease()

    def steps(self) -> list[int]:
        """The steps there are, not verified."""
        return self._store.steps()

    def set_aside_after(self, step: int, reason: str) -> list[int]:
        """Moves newer checkpoints to quarantine; which ones. A running save is waited for."""
        moved = self._store.set_aside_after(step, reason)
        if self._handle is not None and self._handle.step > step:
            self._handle = None
        if self.last_durable is not None and self.last_durable > step:
            self.last_durable = max(self._store.steps(), default=None)
        return moved

    def restore(self) -> RestoredState | None:
        """The newest good checkpoint, verified; None if nothing was ever saved.

        Raises:
            NoGoodStep: there were checkpoints, and none is whole.
        """
        skipped: list[CorruptStep] = []
        for step in reversed(self._store.steps()):
            try:
                metadata = self._store.metadata(step)
                layout = StateLayout.from_json(metadata[LAYOUT])
                state = np.zeros(layout.size_bytes, np.uint8)
                layout.fill(state, self._store.restore(step, layout.tree(state)))
            except CorruptStep as error:
                skipped.append(error)
                continue
            self.last_durable = step
            return RestoredState(step, state, layout, tuple(skipped))
        if skipped:
            raise NoGoodStep(
                f"{self._store.path}: no checkpoint is whole: "
                f"{'; '.join(str(error) for error in skipped)}"
            )
        self._store.latest_good()  # Raises if there were some that are in quarantine now.
        return None

    def begin_save(
        self, step: int, layout: StateLayout, state: Bytes, metadata: Mapping[str, Any]
    ) -> None:
        """Copies the state and saves it in the background. Only when not busy.

        Raises:
            Fenced: another writer has the run.
        """
        assert self._handle is None, "one save at a time"
        kept = {**metadata, LAYOUT: layout.to_json()}
        self._handle = self._store.save(step, layout.tree(state), kept)

    def poll(self, *, wait: bool = False) -> SaveOutcome | None:
        """The outcome of the save under way, once it is over.

        Raises:
            Fenced: another writer has the run.
        """
        handle = self._handle
        if handle is None or not (handle.wait_until_over() if wait else handle.done):
            return None
        self._handle = None
        error = handle.error
        if error is None:
            self.last_durable = handle.step
        else:
            self.num_failed += 1
            self._store.check_lease()
        return SaveOutcome(handle.step, error)

    def close(self) -> None:
        """Gives the run back. Failed saves were told by `poll`."""
        self._store.close()
