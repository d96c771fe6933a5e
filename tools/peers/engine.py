"""Engine: how a server is started and asked. EngineServer: one that runs."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

START_TIMEOUT_S = 1800.0
STOP_TIMEOUT_S = 30.0
POLL_S = 0.02


@dataclass(frozen=True, slots=True)
class Engine:
    """An HTTP server that answers OpenAI's `/v1/completions`."""

    name: str
    weights: str
    """Format of the weights in memory."""
    compute: str
    """What products are computed in."""
    weights_bytes: int
    """Of all weights that a step reads, the head included."""
    kv_value_bytes: int
    """Of one number in the KV cache."""
    command: tuple[str, ...]
    """`{port}` stands for the port, `{cache}` for the folder of compiled code."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Likewise."""
    health_path: str = "/health"
    """Answers 200 when the engine is ready."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """Of every request's body, beyond the common ones."""
    notes: str = ""


class EngineFailed(RuntimeError):
    """A server that ended, or did not become ready."""


class EngineServer:
    """A running engine; a context manager."""

    def __init__(self, engine: Engine, cache: Path) -> None:
        """Starts it and waits until it is ready.

        Args:
            engine: which one.
            cache: its folder of compiled code; made if it is not there.

        Raises EngineFailed with the end of its log.
        """
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.engine = engine
        self.port = free_port()
        self._log: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (lives as long as self)
        start_s = time.perf_counter()

        def filled(part: str) -> str:
            return part.replace("{port}", str(self.port)).replace("{cache}", str(cache))

        self._process = subprocess.Popen(
            [filled(part) for part in engine.command],
            env=os.environ | {name: filled(value) for name, value in engine.environment.items()},
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            self._wait_until_ready(start_s + START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise
        self.ready_s = time.perf_counter() - start_s
        """From exec to ready."""

    def __enter__(self) -> EngineServer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def peak_bytes(self) -> int:
        """The largest resident memory so far of its processes, added up."""
        return resident_peak_bytes(self.pid)

    @property
    def pid(self) -> int:
        """Of its first process."""
        return self._process.pid

    def close(self) -> None:
        """Ends its processes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(STOP_TIMEOUT_S)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._log.close()

    def log_end(self, num_lines: int = 30) -> str:
        """The last lines that it wrote."""
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-num_lines:])

    def _wait_until_ready(self, deadline_s: float) -> None:
        url = f"http://127.0.0.1:{self.port}{self.engine.health_path}"
        while time.perf_counter() < deadline_s:
            if self._process.poll() is not None:
                raise EngineFailed(f"{self.engine.name} ended:\n{self.log_end()}")
            try:
                with urllib.request.urlopen(url, timeout=5):
                    return
            except (urllib.error.URLError, ConnectionError, TimeoutError):
                time.sleep(POLL_S)
        raise EngineFailed(
            f"{self.engine.name} is not ready after {START_TIMEOUT_S:g} s:\n{self.log_end()}"
        )


def resident_peak_bytes(pid: int) -> int:
    """The largest resident memory so far of a process and those below it, added up."""
    process = psutil.Process(pid)
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += peak_of(Path(f"/proc/{one.pid}/status").read_text(encoding="ascii"))
        except OSError:
            continue  # It has ended meanwhile.
    return total


def peak_of(status: str) -> int:
    """VmHWM in bytes of a `/proc/PID/status`; 0 of a process that has ended."""
    for line in status.splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
