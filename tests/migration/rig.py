"""Conversions in one call, small models with a tokenizer, and a process that can be killed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from checkpoint.migrate.manifest import MigrationManifest
from checkpoint.migrate.read_back import ReadBack
from checkpoint.migrate.run import Limits, OnProgress
from jaxserve.migration.convert import plan_conversion
from jaxserve.migration.request import ConversionRequest

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "tests" / "goldens" / "tiny"
VARIANTS = sorted(path.name for path in TINY.iterdir() if path.is_dir())


def convert(
    source: Path,
    target: Path,
    to: str,
    *,
    memory_bytes: int | None = None,
    force: bool = False,
    check: Any = None,
    read_back: ReadBack = ReadBack.ENDS,
    **options: Any,
) -> MigrationManifest:
    request = ConversionRequest(target, to, **options)
    with plan_conversion(
        source, request, num_workers=2, memory_bytes=memory_bytes, check=check
    ) as conversion:
        limits = Limits(2, memory_bytes, force=force, read_back=read_back)
        return conversion.run(limits, OnProgress())


def model_files(folder: Path) -> dict[str, bytes]:
    """What a Hugging Face folder consists of: no manifest, no golden outputs."""
    own = ("jaxserve-manifest.json", "logits.npz")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in own}


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    """A folder like a golden's with other tensors, and fields of its config changed."""
    folder.mkdir()
    fields = json.loads((TINY / "mqa" / "config.json").read_text()) | config
    (folder / "config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


CHILD = """
import json, os, resource, signal, sys
import jaxserve.cli.checkpoint, jaxserve.cli.main
import jaxserve.migration.convert, jaxserve.migration.logits, jaxserve.migration.verify
from checkpoint.migrate import journal, publish

def die(after, function):
    calls = 0
    def wrapped(*args, **kwargs):
        nonlocal calls
        result = function(*args, **kwargs)
        calls += 1
        if calls == after:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    child = os.fork()
    if child == 0:
        if order["kill_after_windows"]:
            append = die(order["kill_after_windows"], journal.Journal.append)
            journal.Journal.append = append
        if order["file_limit_bytes"]:
            limit = order["file_limit_bytes"]
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["jaxserve", "checkpoint", *order["args"]]
        code = 0
        try:
            jaxserve.cli.main.main()
        except SystemExit as error:
            code = error.code or 0
        except BaseException:
            import traceback
            traceback.print_exc()
            code = 99
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@dataclass
class Run:
    """One command in a process of its own."""

    pid: int
    log: Path
    forker: Forker

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):  # It was faster.
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        return int(self.forker.line())

    def text(self) -> str:
        return self.log.read_text()


class Forker:
    """A process that has imported everything and forks one child a command."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, "-c", CHILD],
            env={**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.line() == "ready"

    def line(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the forking process has ended"
        return line.strip()

    def start(self, *args: object, kill_after_windows: int = 0, file_limit_bytes: int = 0) -> Run:
        self._count += 1
        log = self._folder / f"run-{self._count}.log"
        order = {
            "args": [str(arg) for arg in args],
            "log": str(log),
            "kill_after_windows": kill_after_windows,
            "file_limit_bytes": file_limit_bytes,
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Run(int(self.line()), log, self)

    def run(self, *args: object, **options: int) -> tuple[int, str]:
        run = self.start(*args, **options)
        code = run.wait()
        return code, run.text() if run.log.exists() else ""

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=180)
        assert self._process.stdout is not None
        self._process.stdout.close()
