"""Drives runs from outside: real commands in processes of their own, and their signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxserve.cli.train import _load
from jaxserve.trainer.run_start import StartOptions, train
from tests.trainer.independent_reader import ledger_records
from tests.trainer.plain_view import PlainView

ROOT = Path(__file__).resolve().parents[2]
TOY = "tests.trainer.toy_trainer"
_START = """
import sys
from pathlib import Path
from jaxserve.cli.train import _load
from jaxserve.cli.main import is_user_error
from jaxserve.trainer.run_start import StartOptions, train
from tests.trainer.plain_view import PlainView
config = _load(Path(sys.argv[1]), sys.argv[4:], None, int(sys.argv[3]), None)
options = StartOptions(**eval(sys.argv[2]))
try:
    sys.exit(train(config, options, PlainView(), "tests.trainer.toy_trainer"))
except Exception as error:
    if not is_user_error(error):
        raise
    print("error:", error, file=sys.stderr)
    sys.exit(2)
"""

CONFIG = """
run_dir = "{run}"
total_steps = {total_steps}
compilation_cache_dir = "{cache}"
[model.shape]
family = "llama"
vocab_size = 257
hidden_size = 32
intermediate_size = 64
num_layers = 2
num_heads = 2
num_kv_heads = 1
head_dim = 16
max_position_embeddings = 64
tie_word_embeddings = true
[data]
path = "{data}"
log_reads = true
[batch]
global_batch_size = 16
num_logical_shards = 8
micro_batch_size = 2
[schedule]
kind = "cosine"
peak_value = 0.003
warmup = 4
[durability]
checkpoint_every = 10
[logging]
plot = false
"""


@dataclass
class Run:
    """A run's folder and config, and the command that trains it.

    Attributes:
        path: its folder.
        config: the TOML file.
        is_toy: trainers without JAX.
    """

    path: Path
    config: Path
    is_toy: bool = True
    process: subprocess.Popen[str] | None = field(default=None, repr=False)

    def start(
        self, processes: int = 1, *settings: str, devices: int = 1, **options: bool
    ) -> subprocess.Popen[str]:
        """Starts the command."""
        if self.is_toy:
            command = [sys.executable, "-c", _START, str(self.config), repr(options)]
            command += [str(processes), *settings]
        else:
            command = [sys.executable, "-m", "jaxserve", "train", str(self.config)]
            command += [f"--set=placement.processes={processes}"]
            command += [f"--set=placement.devices_per_process={devices}"]
            command += [f"--set={setting}" for setting in settings]
            command += [f"--{name.replace('_', '-')}" for name, value in options.items() if value]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
        )
        return self.process

    def finish(self, timeout_s: float = 300) -> tuple[int, str]:
        """Waits for the command: its exit code and what it said."""
        assert self.process is not None
        _, said = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, said

    def train(self, processes: int = 1, *settings: str, devices: int = 1, **options: bool) -> str:
        """Runs to the end; what the command said."""
        self.start(processes, *settings, devices=devices, **options)
        code, said = self.finish()
        assert code == 0, said
        return said

    def train_here(
        self,
        processes: int = 1,
        *settings: str,
        meddle: Callable[[], None] = lambda: None,
        **options: bool,
    ) -> int:
        """Trains with toys in this process, which saves its start; the exit code.

        Args:
            processes, settings, options: as of `start`.
            meddle: runs beside it in a thread; what it raises fails the test.
        """
        config = _load(self.config, list(settings), None, processes, None)
        with ThreadPoolExecutor(1) as pool:
            meddling = pool.submit(meddle)
            code = train(config, StartOptions(**options), PlainView(), TOY)
            meddling.result()
        return code

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Signals the supervisor."""
        assert self.process is not None
        self.process.send_signal(number)

    def records(self) -> list[dict[str, Any]]:
        """The ledger's whole lines now."""
        path = self.path / "ledger.jsonl"
        if not path.exists():
            return []
        whole = path.read_bytes().rpartition(b"\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def checked(self) -> list[dict[str, Any]]:
        """The ledger's lines, with their chain checked."""
        return ledger_records(self.path / "ledger.jsonl")

    def wait_for(
        self, condition: Callable[[list[dict[str, Any]]], bool], timeout_s: float = 240
    ) -> list[dict[str, Any]]:
        """Waits until the ledger's lines fulfil a condition."""
        deadline_s = time.monotonic() + timeout_s
        while time.monotonic() < deadline_s:
            records = self.records()
            if condition(records):
                return records
            if self.process is not None and self.process.poll() is not None:
                records = self.records()
                assert condition(records), self.process.communicate()[1]
                return records
            time.sleep(0.01)
        raise AssertionError(f"nothing of the kind within {timeout_s} s: {self.records()[-3:]}")

    def wait_for_step(self, step: int, timeout_s: float = 240) -> list[dict[str, Any]]:
        """Waits until `step` is committed."""
        return self.wait_for(
            lambda records: any(r["kind"] == "step" and r["step"] >= step for r in records),
            timeout_s,
        )

    def trainer_pids(self) -> list[int]:
        """Of the newest generation."""
        return [r for r in self.records() if r["kind"] == "generation"][-1]["pids"]


def is_alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat[stat.rindex(")") + 2] not in "ZX"


def wait_for_death(pids: list[int], timeout_s: float = 60) -> None:
    """Fails if one of them still runs after `timeout_s`."""
    deadline_s = time.monotonic() + timeout_s
    while alive := [pid for pid in pids if is_alive(pid)]:
        assert time.monotonic() < deadline_s, f"{alive} still run"
        time.sleep(0.02)


def send(pid: int, number: int) -> None:
    """Signals a process that must be alive."""
    assert is_alive(pid), f"{pid} has ended already"
    os.kill(pid, number)
