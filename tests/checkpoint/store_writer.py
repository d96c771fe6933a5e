"""Real writer processes for the store's tests: started, killed and stopped at will.

`python store_writer.py` is a template that has imported all it needs; it forks one writer
per line of JSON on its standard input and answers with the writer's process id.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from checkpoint.store import Fenced, ProcessIdentity, RetentionPolicy, Store, StoreOptions

WATCHED = ("os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "open")


def tree_of(step: int, num_floats: int = 20_000) -> dict[str, Any]:
    """The tree that every test writer saves as `step`."""
    generator = np.random.default_rng(step)
    return {
        "params": {"layers": {"w": generator.random((4, num_floats // 4), np.float32)}},
        "opt_state": {"count": np.int32(step), "mu": generator.random(512, np.float32)},
        "next_index": 16 * step,
    }


def equals_tree(step: int, tree: dict[str, Any], num_floats: int = 20_000) -> bool:
    """Whether `tree` is `tree_of(step)` to the bit."""
    wanted = tree_of(step, num_floats)
    return (
        tree["params"]["layers"]["w"].tobytes() == wanted["params"]["layers"]["w"].tobytes()
        and tree["opt_state"]["mu"].tobytes() == wanted["opt_state"]["mu"].tobytes()
        and tree["opt_state"]["count"] == wanted["opt_state"]["count"]
        and tree["next_index"] == wanted["next_index"]
    )


def write(job: dict[str, Any]) -> None:
    """Opens a store and saves; notes every event in the job's log."""
    with Path(job["log"]).open("a", buffering=1) as log:
        _write(job, log)


def _write(job: dict[str, Any], log: TextIO) -> None:
    holder = ProcessIdentity.current()
    if job.get("boot_id"):
        holder = replace(holder, boot_id=job["boot_id"], host="elsewhere")
    options = StoreOptions(
        retention=RetentionPolicy(keep_last=job.get("keep_last", 3)),
        lease_ttl_s=job.get("ttl_s", 10.0),
        lease_wait_s=job.get("wait_s", 0.0),
    )
    num_floats = job.get("num_floats", 20_000)
    strike = job.get("strike")
    try:
        if strike and strike.get("from_open"):
            _strike(**strike)
        with Store(job["path"], options, holder=holder) as store:
            print("open", store.epoch, file=log)
            if job.get("fork"):
                _note_in_a_fork(store, log)
            first = max(store.steps(), default=0) + 1
            if strike and not strike.get("from_open"):
                _strike(**strike)
            for step in range(first, first + job.get("num_saves", 1)):
                if step == first + 1 and job.get("file_limit_bytes"):
                    limit = job["file_limit_bytes"]
                    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
                handle = store.save(step, tree_of(step, num_floats), {"epoch": store.epoch})
                try:
                    handle.wait()
                    print("ack", step, file=log)
                except Exception as error:
                    print("failed", step, type(error).__name__, error, file=log)
                    left = len(list((store.path / "staging").iterdir()))
                    print("staged", left, file=log)
                    if not job.get("file_limit_bytes"):
                        raise
                    unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    except Exception as error:
        print("error", type(error).__name__, error, file=log)
    print("end", file=log)


def _note_in_a_fork(store: Store, log: TextIO) -> None:
    pid = os.fork()
    if pid == 0:
        try:
            store.check_lease()
        except Fenced as error:
            print("forked", error, file=log)
        os._exit(0)
    os.waitpid(pid, 0)


def _strike(signal_name: str, count: int = 1, contains: str = "", from_open: bool = False) -> None:
    """This process signals itself just before its `count`-th matching file-system call."""
    left = count

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in WATCHED and contains in str(arguments) and _writes(event, arguments):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.Signals[signal_name])
                # A stop reaches this thread a little later: not after the call, though.
                time.sleep(0.3)

    sys.addaudithook(hook)


def _writes(event: str, arguments: tuple[Any, ...]) -> bool:
    if event != "open":
        return True
    flags = arguments[2] or 0
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or "x" in str(arguments[1])


class Writer:
    """A writer process.

    Attributes:
        pid: its process id.
    """

    def __init__(self, pid: int, log: Path) -> None:
        self.pid = pid
        self._log = log

    def log(self) -> list[str]:
        """What it has noted so far."""
        return self._log.read_text().splitlines() if self._log.exists() else []

    def wait_for(self, word: str, timeout_s: float = 60.0) -> str:
        """The first line of its log that starts with `word`."""
        end = time.monotonic() + timeout_s
        while time.monotonic() < end:
            for line in self.log():
                if line.startswith(word):
                    return line
            time.sleep(0.01)
        raise AssertionError(f"no {word!r} in {self.log()}")

    def acked(self) -> list[int]:
        """The steps whose saves it saw acknowledged."""
        return [int(line.split()[1]) for line in self.log() if line.startswith("ack")]

    def state(self) -> str:
        """The kernel's letter for it; empty when there is no such process."""
        try:
            return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return ""

    def wait_for_state(self, letter: str, timeout_s: float = 60.0) -> None:
        """Waits until it is stopped ("T") or gone ("")."""
        end = time.monotonic() + timeout_s
        while self.state() != letter:
            assert time.monotonic() < end, f"process is {self.state()!r}, log {self.log()}"
            time.sleep(0.01)

    def signal(self, number: signal.Signals) -> None:
        """Sends it a signal."""
        os.kill(self.pid, number)


class WriterTemplate:
    """Forks writers that need not import anything first."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
        root = Path(__file__).resolve().parents[2]
        environment["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def start(self, path: Path, **job: Any) -> Writer:
        """A new writer on the store at `path`; see `write` for the job."""
        self._count += 1
        log = self._folder / f"writer-{self._count}.log"
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({**job, "path": str(path), "log": str(log)}) + "\n")
        self._process.stdin.flush()
        return Writer(int(self._process.stdout.readline()), log)

    def close(self) -> None:
        """Ends the template; the tests end their writers."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=30)


def _reap(_signal: int, _frame: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def main() -> None:
    import orbax.checkpoint  # noqa: F401 - so that the writers need not

    signal.signal(signal.SIGCHLD, _reap)
    for line in iter(sys.stdin.readline, ""):
        pid = os.fork()
        if pid == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            write(json.loads(line))
            os._exit(0)
        print(pid, flush=True)


if __name__ == "__main__":
    main()
