"""Where things lie in a run's folder, and the small files that are exchanged through it."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoint.store.durable import canonical_json, fsync_path
from jaxserve.trainer.errors import RunError

_MAX_LOGS = 64


@dataclass(frozen=True)
class RunFolder:
    """The paths of one run.

    Attributes:
        root: its folder.
    """

    root: Path

    @property
    def world(self) -> Path:
        """The logical world and the numerics fingerprint, frozen at the first start."""
        return self.root / "world.json"

    @property
    def config(self) -> Path:
        """What the run was last started with, every field."""
        return self.root / "config.toml"

    @property
    def model(self) -> Path:
        """The model's config."""
        return self.root / "model.json"

    @property
    def checkpoints(self) -> Path:
        """The checkpoint store."""
        return self.root / "checkpoints"

    @property
    def ledger(self) -> Path:
        """See ledger.py."""
        return self.root / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        """One line a committed step or evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def status(self) -> Path:
        """What the supervisor last said about itself; not durable."""
        return self.root / "status.json"

    @property
    def plot(self) -> Path:
        """Loss and learning rate."""
        return self.root / "plot.png"

    @property
    def logs(self) -> Path:
        """Output of the trainers, by generation and rank."""
        return self.root / "logs"

    @property
    def requests(self) -> Path:
        """What `resize` and `stop` ask for; each file is removed once it is heard."""
        return self.root / "requests"

    def make(self) -> None:
        """Makes the folders."""
        for folder in (self.root, self.logs, self.requests):
            folder.mkdir(parents=True, exist_ok=True)

    def require(self) -> None:
        """Raises RunError: there is no run here."""
        if not self.world.is_file():
            raise RunError(
                f"{self.root} holds no training run (it has no world.json); "
                "`jaxserve train CONFIG.toml` makes one in the config's run_dir"
            )

    def ask(self, request: Mapping[str, Any]) -> None:
        """Leaves a request for the run's supervisor."""
        self.requests.mkdir(parents=True, exist_ok=True)
        name = f"request-{secrets.token_hex(8)}.json"
        temporary = self.requests / f".{name}"
        temporary.write_text(json.dumps(request))
        temporary.replace(self.requests / name)

    def take_requests(self) -> list[dict[str, Any]]:
        """The requests left since the last call, oldest first; what is no request is dropped."""
        paths = sorted(self.requests.glob("request-*.json"), key=lambda path: path.stat().st_mtime)
        taken = []
        for path in paths:
            try:
                request = json.loads(path.read_text())
            except ValueError:
                request = None
            path.unlink(missing_ok=True)
            if isinstance(request, dict):
                taken.append(request)
        return taken

    def write_status(self, status: Mapping[str, Any]) -> None:
        """Replaces the status file as a whole."""
        temporary = self.status.with_name(".status.json.new")
        temporary.write_text(json.dumps(status))
        temporary.replace(self.status)

    def read_status(self) -> dict[str, Any] | None:
        """The status file; None if there is none."""
        try:
            status = json.loads(self.status.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return status if isinstance(status, dict) else None

    def forget_old_logs(self) -> None:
        """Deletes the trainers' oldest logs beyond the newest 64."""
        logs = sorted(self.logs.glob("generation-*.log"))
        for path in logs[:-_MAX_LOGS]:
            path.unlink(missing_ok=True)


def write_durably(path: Path, data: bytes) -> None:
    """Replaces a file as a whole; it is there after a crash, old or new."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    fsync_path(path.parent)


def write_json_durably(path: Path, value: Any) -> None:
    """The same for a JSON value."""
    write_durably(path, canonical_json(value))
