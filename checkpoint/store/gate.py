"""The gate: the fence that stops a writer whose epoch is over.

Every epoch has one folder, `gates/epoch-N`, made only when the epoch begins. Whatever
enters `steps` is first renamed into the writer's gate and then from there to its place;
whatever leaves `steps` goes the other way. A newer writer fences an older one by one
rename of its gate. From that instant each of the older writer's renames names a folder
that is not there, and fails: between looking and acting there is no gap in which a
paused writer could wake up.
"""

from __future__ import annotations

import contextlib
import logging
import secrets
import shutil
from pathlib import Path

from checkpoint.store.durable import fsync_path
from checkpoint.store.errors import Fenced, StepExists
from checkpoint.store.layout import StoreLayout

logger = logging.getLogger(__name__)

_QUARANTINE = "quarantine-"


class Gate:
    """The gate of one epoch.

    Attributes:
        epoch: the epoch.
    """

    def __init__(self, layout: StoreLayout, epoch: int) -> None:
        self.epoch = epoch
        self._layout = layout
        self._path = layout.gate(epoch)

    def make(self) -> None:
        """Makes the gate. Only the writer that has just claimed the epoch may."""
        self._path.mkdir()

    def check(self) -> None:
        """Raises Fenced if the gate is gone."""
        if not self._path.is_dir():
            raise self._fenced()

    def publish(self, staged: Path, final: Path) -> None:
        """Moves a finished folder to its place.

        Raises:
            Fenced: a newer writer has taken over; nothing became visible.
            StepExists: there is something at `final`.
        """
        inside = self._path / f"publish-{final.name}-{secrets.token_hex(4)}"
        self._rename(staged, inside)
        try:
            self._rename(inside, final)
        except OSError as error:
            if not final.exists():
                raise
            shutil.rmtree(inside, ignore_errors=True)
            raise StepExists(f"{final} exists already; it was not replaced") from error
        fsync_path(final.parent)

    def delete(self, path: Path) -> None:
        """Takes a folder out of sight at once and then deletes it. Raises Fenced."""
        inside = self._path / f"delete-{path.name}-{secrets.token_hex(4)}"
        self._rename(path, inside)
        fsync_path(path.parent)
        shutil.rmtree(inside, ignore_errors=True)

    def quarantine(self, path: Path, target: Path) -> None:
        """Moves a folder aside. Raises Fenced."""
        inside = self._path / f"{_QUARANTINE}{target.name}"
        self._rename(path, inside)
        self._rename(inside, target)
        fsync_path(path.parent)
        fsync_path(target.parent)

    def remove(self) -> None:
        """Ends the epoch from its own side."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._path)

    def _rename(self, source: Path, target: Path) -> None:
        try:
            source.rename(target)
        except FileNotFoundError as error:
            if not self._path.is_dir():
                raise self._fenced() from error
            raise

    def _fenced(self) -> Fenced:
        return Fenced(
            f"{self._layout.root}: the writer of epoch {self.epoch} was fenced by a newer one; "
            "nothing more is written. End this process: the newer writer has the store"
        )


def fence_older_epochs(layout: StoreLayout, epoch: int) -> None:
    """Shuts the gates of all epochs before `epoch`, then clears them away.

    A step that an older writer was moving to quarantine arrives there. One that it was
    publishing was never acknowledged, one that it was deleting is gone: both are removed.
    """
    for older in layout.list_gates():
        if older < epoch:
            target = layout.fenced / f"epoch-{older:08d}-by-{epoch:08d}"
            with contextlib.suppress(FileNotFoundError):
                layout.gate(older).rename(target)
                logger.info("%s: the gate of epoch %d is shut", layout.root, older)
    for leftover in layout.fenced.iterdir():
        for entry in leftover.glob(f"{_QUARANTINE}*"):
            target = layout.quarantine / entry.name.removeprefix(_QUARANTINE)
            with contextlib.suppress(FileNotFoundError):
                entry.rename(target)
        shutil.rmtree(leftover, ignore_errors=True)


def clear_staging(layout: StoreLayout, epoch: int) -> None:
    """Deletes what writers of earlier epochs, and failed saves of this one, left half-written.

    Only the writer of `epoch` may call it, and not while it saves.
    """
    for entry in layout.staging.iterdir():
        owner = entry.name.split("-", 1)[0]
        if not owner.isdigit() or int(owner) <= epoch:
            logger.info("%s: deleting the half-written %s", layout.root, entry.name)
            shutil.rmtree(entry, ignore_errors=True)
