"""How much memory this process may still take: the host's or its container's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class HostMemory:
    total_bytes: int
    available_bytes: int


def read_host_memory(cgroup: Path = CGROUP) -> HostMemory:
    """The host's memory, cut to the container's limit (cgroup v2) if it has one.

    File caches count as used in a cgroup although the kernel gives them back,
    so they are added to what is available.
    """
    host = psutil.virtual_memory()
    limit = _number(cgroup / "memory.max")
    if limit is None or limit >= host.total:
        return HostMemory(host.total, host.available)
    used = _number(cgroup / "memory.current") or 0
    available = max(0, limit - used + _inactive_file_bytes(cgroup / "memory.stat"))
    return HostMemory(limit, min(host.available, available))


def _number(path: Path) -> int | None:
    text = path.read_text().strip() if path.is_file() else ""
    return int(text) if text.isdigit() else None


def _inactive_file_bytes(path: Path) -> int:
    if not path.is_file():
        return 0
    fields = dict(line.split() for line in path.read_text().splitlines())
    return int(fields.get("inactive_file", 0))
