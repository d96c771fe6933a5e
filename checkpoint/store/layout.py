"""Where things are in a store's folder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

STEP_NAME = re.compile(r"\d{12}")
EPOCH_NAME = re.compile(r"epoch-(\d{8})")
CLAIM_NAME = re.compile(r"epoch-(\d{8})\.json")
MAX_STEP = 10**12 - 1

ARRAYS = "arrays"
MANIFEST = "manifest.json"
COMMIT = "commit.json"


@dataclass(frozen=True)
class StoreLayout:
    """The folders of one store.

    Attributes:
        root: absolute path of the store.
    """

    root: Path

    @property
    def steps(self) -> Path:
        """Checkpoints, one folder each. Folders enter and leave whole, by rename."""
        return self.root / "steps"

    @property
    def lease(self) -> Path:
        """Claims of epochs: who may write."""
        return self.root / "lease"

    @property
    def gates(self) -> Path:
        """One folder per living epoch; what enters or leaves `steps` passes through it."""
        return self.root / "gates"

    @property
    def fenced(self) -> Path:
        """Gates of epochs that are over, until their content is cleared away."""
        return self.root / "fenced"

    @property
    def staging(self) -> Path:
        """Checkpoints being written. Nothing here counts."""
        return self.root / "staging"

    @property
    def quarantine(self) -> Path:
        """Steps moved aside, each with a `.reason.json`. Never deleted by the store."""
        return self.root / "quarantine"

    @property
    def folders(self) -> tuple[Path, ...]:
        """All of the above; `steps`, by which readers know a store, is the last."""
        return self.lease, self.gates, self.fenced, self.staging, self.quarantine, self.steps

    def step(self, step: int) -> Path:
        """The folder of a checkpoint."""
        return self.steps / f"{step:012d}"

    def gate(self, epoch: int) -> Path:
        """The gate of an epoch."""
        return self.gates / f"epoch-{epoch:08d}"

    def list_steps(self) -> list[int]:
        """The steps that have a folder, ascending."""
        names = (entry.name for entry in self.steps.iterdir())
        return sorted(int(name) for name in names if STEP_NAME.fullmatch(name))

    def list_gates(self) -> list[int]:
        """The epochs that have a gate, ascending."""
        matches = (EPOCH_NAME.fullmatch(entry.name) for entry in self.gates.iterdir())
        return sorted(int(match[1]) for match in matches if match)

    def list_claims(self) -> list[int]:
        """The epochs claimed so far (the newest ones are kept), ascending."""
        matches = (CLAIM_NAME.fullmatch(entry.name) for entry in self.lease.iterdir())
        return sorted(int(match[1]) for match in matches if match)
