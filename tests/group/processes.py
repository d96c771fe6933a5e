"""`jaxserve serve` in several processes, for the tests of this folder."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jaxserve.client import Client
from jaxserve.engine.request import RequestOutput
from tests.server.tiny_model import CONTEXT

PROGRAM: tuple[object, ...] = (sys.executable, "-m", "jaxserve.cli.main", "serve")
FLAGS = {
    "--max-model-len": CONTEXT,
    "--token-budget": 8,
    "--buckets": "one",
    "--max-num-seqs": 4,
    "--kv-cache-bytes": "2MiB",
    "--grpc-port": 0,
    "--http-port": 0,
}
GREEDY = {"temperature": 0, "ignore_eos": True}


@dataclass
class ServerProcess:
    """A leader, or a server of one process."""

    process: subprocess.Popen[str]
    grpc: str
    http: str
    log: Path

    @property
    def children(self) -> list[int]:
        """Its followers, by process id."""
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return sorted(int(pid) for pid in path.read_text().split())


@contextlib.contextmanager
def serve(model: Path, cache: Path, log: Path, *flags: object) -> Iterator[ServerProcess]:
    """A server that is READY; killed at the end."""
    command = [*PROGRAM, "--model", model]
    command += [*(part for pair in FLAGS.items() for part in pair), *flags]
    command += ["--compilation-cache-dir", cache]
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=subprocess.PIPE, stderr=file, text=True
        )
    try:
        assert process.stdout is not None
        match = re.match(r"READY grpc=(\S+) http=(\S+)\n", process.stdout.readline())
        assert match, log.read_text()
        yield ServerProcess(process, match[1], match[2], log)
    finally:
        process.kill()
        process.communicate()


def outputs(client: Client, prompt: str, num_tokens: int) -> tuple[list[int], list[float]]:
    """Greedy tokens and their logprobs."""
    deltas: list[RequestOutput] = list(
        client.generate(prompt, max_tokens=num_tokens, logprobs=0, **GREEDY)
    )
    ids = [token_id for delta in deltas for token_id in delta.token_ids]
    return ids, [entry.logprob for delta in deltas for entry in delta.logprobs or ()]


def wait_for_end(pid: int, timeout_s: float) -> None:
    """Returns when a process that is no child of this one is gone."""
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.02)
    raise AssertionError(f"process {pid} is still there after {timeout_s:g} s")
