"""Servers that one command holds ready for others: vLLM compiles for minutes at every start, so
that a short quiet time of the machine is left to the loads."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.peers.engine import Engine, resident_peak_bytes
from tools.peers.measure import start, warm_up
from tools.peers.records import Records

_CHECK_S = 1.0


@dataclass(frozen=True, slots=True)
class HeldServer:
    """A running server of another process; it stays when this one ends."""

    engine: Engine
    port: int
    pid: int

    def peak_bytes(self) -> int:
        """As `EngineServer.peak_bytes`."""
        return resident_peak_bytes(self.pid)

    def close(self) -> None:
        """Leaves it to the one that holds it."""


def hold(
    engines: Sequence[Engine], records: Records, out: Path, cache_root: Path, vocab_size: int
) -> None:
    """Starts and warms up engines, tells of them in `out`, and waits to be ended."""
    with ExitStack() as stack:
        for engine in engines:
            server = stack.enter_context(start(engine, records, cache_root))
            warm_up(server, vocab_size)
            note = _note_of(engine, out)
            note.write_text(json.dumps({"port": server.port, "pid": server.pid}))
            stack.callback(note.unlink, missing_ok=True)
        while True:
            time.sleep(_CHECK_S)


def held_servers(engines: Sequence[Engine], out: Path) -> dict[str, HeldServer]:
    """Those of `engines` that another process holds now, by name."""
    held = {}
    for engine in engines:
        note = _note_of(engine, out)
        place = json.loads(note.read_text()) if note.is_file() else None
        if place is not None and _lives(place["pid"]):
            held[engine.name] = HeldServer(engine, **place)
    return held


def _lives(pid: int) -> bool:
    """Not so if it has ended, also if nobody has asked how."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _note_of(engine: Engine, out: Path) -> Path:
    return out / f"held-{engine.name.replace(' ', '-')}.json"
