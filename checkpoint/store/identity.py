"""Who a writer is, and whether it still lives. Linux only: reads /proc."""

from __future__ import annotations

import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")


@dataclass(frozen=True)
class ProcessIdentity:
    """One process, never to be confused with a later one of the same number.

    Attributes:
        host: host name, for messages only: names are not unique.
        boot_id: random id of the running kernel; new at every boot.
        pid_namespace: containers of one kernel number their processes apart.
        pid: process id.
        start_ticks: start time in clock ticks since boot; a reused pid has another.
    """

    host: str
    boot_id: str
    pid_namespace: str
    pid: int
    start_ticks: int

    @classmethod
    def current(cls) -> ProcessIdentity:
        """This process."""
        pid = os.getpid()
        stat = _read_stat(pid)
        assert stat is not None, "a running process has an entry in /proc"
        return cls(socket.gethostname(), _boot_id(), _pid_namespace(), pid, stat[1])

    def is_local(self) -> bool:
        """Whether this process could see the other one, if it were alive."""
        return self.boot_id == _boot_id() and self.pid_namespace == _pid_namespace()

    def is_dead(self) -> bool:
        """Whether a local process can no longer do anything. Stopped ones can: they may wake."""
        assert self.is_local(), "nothing is known about processes of other machines"
        stat = _read_stat(self.pid)
        if stat is None:
            return True
        state, start_ticks = stat
        if start_ticks != self.start_ticks:
            return True
        # The other threads of a process outlive a first thread that has ended.
        return state in ("Z", "X") and _num_threads(self.pid) <= 1

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values."""
        return asdict(self)


def _boot_id() -> str:
    return (PROC / "sys/kernel/random/boot_id").read_text().strip()


def _pid_namespace() -> str:
    return str((PROC / "self/ns/pid").readlink())


def _read_stat(pid: int) -> tuple[str, int] | None:
    try:
        text = (PROC / str(pid) / "stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The command's name stands in brackets and may itself hold blanks and brackets.
    fields = text[text.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def _num_threads(pid: int) -> int:
    try:
        return len(list((PROC / str(pid) / "task").iterdir()))
    except (FileNotFoundError, ProcessLookupError):
        return 0
