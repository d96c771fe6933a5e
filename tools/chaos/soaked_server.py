"""The server under the soak: a process of its own, and what can be seen of it from outside."""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import psutil
from prometheus_client.parser import text_string_to_metric_families

OPTIONS = {
    "buckets": "one",  # A request's bits then do not depend on what runs beside it.
    "token-budget": "32",
    "max-num-seqs": "16",
    "kv-cache-bytes": "24MB",
    "max-queued-requests": "64",
    "drain-timeout-s": "240",
}
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Of the server's process."""

    at_s: float
    rss_bytes: int
    num_fds: int
    num_threads: int


class SoakedServer:
    """`jaxserve serve` on two ports that stay the same over a restart.

    Args:
        model: its folder.
        log: the file that its standard error goes to.
        cores: that it may use.
    """

    def __init__(self, model: Path, log: Path, cores: set[int]) -> None:
        self._model = model
        self._log = log
        self._cores = cores
        self.grpc_port, self.http_port = _free_ports(2)
        self._process: subprocess.Popen[str] | None = None

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def start(self) -> None:
        """Returns when it is READY. Raises RuntimeError with its log."""
        command = [sys.executable, "-m", "jaxserve", "serve", "--model", str(self._model)]
        command += ["--grpc-port", str(self.grpc_port), "--http-port", str(self.http_port)]
        for name, value in OPTIONS.items():
            command += [f"--{name}", value]
        mine = os.sched_getaffinity(0)
        with self._log.open("a") as log:
            # Inherited by all threads of the child.
            os.sched_setaffinity(0, self._cores)
            try:
                self._process = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=log, text=True
                )
            finally:
                os.sched_setaffinity(0, mine)
        told = self._process.stdout
        assert told is not None
        in_time, _, _ = select.select([told], [], [], START_TIMEOUT_S)
        if not in_time or not told.readline().startswith("READY"):
            self.close()
            raise RuntimeError(
                f"the server did not start: {self._log.read_text(errors='replace')[-2000:]}"
            )

    def terminate(self) -> None:
        """SIGTERM, which begins a drain."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def wait(self) -> int:
        """Its exit code. Raises TimeoutExpired."""
        assert self._process is not None
        return self._process.wait(STOP_TIMEOUT_S)

    def close(self) -> None:
        """Ends it, whatever it does."""
        if self._process is not None and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def sample(self) -> Sample | None:
        """None while it is gone."""
        if self._process is None:
            return None
        try:
            seen = psutil.Process(self._process.pid)
            with seen.oneshot():
                return Sample(
                    time.monotonic(), seen.memory_info().rss, seen.num_fds(), seen.num_threads()
                )
        except psutil.Error:
            return None

    def metrics(self) -> dict[str, float]:
        """Its unlabelled figures by name, without `jaxserve_`."""
        address = f"http://127.0.0.1:{self.http_port}/metrics"
        with urllib.request.urlopen(address, timeout=10) as reply:
            text = reply.read().decode()
        return {
            sample.name.removeprefix("jaxserve_"): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if not sample.labels
        }


def _free_ports(count: int) -> list[int]:
    ends = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [end.getsockname()[1] for end in ends]
    for end in ends:
        end.close()
    return ports
