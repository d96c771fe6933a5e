"""Conversion: one that is measured, and what it took, in a process of its own."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from checkpoint.migrate.read_back import ReadBack
from jaxserve.migration.request import FORMATS
from tools.migration_speed.load import ForeignLoad

LIMIT_FILES = ("memory.max", "memory.limit_in_bytes")
CHILD = """
import json, sys, time
from checkpoint.migrate.run import peak_memory_bytes
from jaxserve.cli.main import main
import jaxserve.migration.convert, jaxserve.migration.logits
before = peak_memory_bytes()
start = time.perf_counter()
code = 0
try:
    main()
except SystemExit as error:
    code = error.code or 0
seconds = time.perf_counter() - start
peak = peak_memory_bytes()
print("MEASURED", json.dumps({"code": code, "seconds": seconds, "peak": peak, "imports": before}))
"""


@dataclass(frozen=True)
class Conversion:
    """Which one: see the tool."""

    source: str
    to: str
    quantization: str | None = None
    read_back: str | None = None

    @classmethod
    def parse(cls, name: str) -> Conversion:
        """Raises argparse.ArgumentTypeError."""
        plain, _, read_back = name.partition("+")
        source, _, rest = plain.partition("-")
        to, _, quantization = rest.partition("-")
        if source not in ("safetensors", "orbax") or to not in FORMATS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is no conversion: give safetensors or orbax, -, and one of "
                f"{', '.join(FORMATS)}"
            )
        if read_back and read_back not in list(ReadBack):
            raise argparse.ArgumentTypeError(
                f"{name!r}: after + stands what is read back: {', '.join(ReadBack)}"
            )
        return cls(source, to, quantization or None, read_back or None)

    @property
    def name(self) -> str:
        """The inverse of `parse`."""
        plain = "-".join(filter(None, (self.source, self.to, self.quantization)))
        return "+".join(filter(None, (plain, self.read_back)))


@dataclass(frozen=True)
class Measured:
    """One conversion.

    Attributes:
        seconds: from the command's start to its end, without starting Python.
        process_s: of the whole process, with Python's start and imports.
        peak_bytes: most memory that the process held.
        imports_bytes: what it held after its imports.
        num_bytes: of the model.
        foreign_share: see `ForeignLoad`; None where it was not read.
    """

    seconds: float
    process_s: float
    peak_bytes: int
    imports_bytes: int
    num_bytes: int
    foreign_share: float | None = None


def measure_conversion(
    conversion: Conversion,
    source: Path,
    target: Path,
    num_bytes: int,
    *,
    memory_budget: str | None = None,
    cgroup: Path | None = None,
) -> Measured:
    """Convert in a process of its own.

    Raises:
        RuntimeError: the conversion failed; holds what it printed.
    """
    arguments = ["convert", str(source), str(target), "--to", conversion.to, "--json"]
    if conversion.quantization is not None:
        arguments += ["--quantization", conversion.quantization]
    if conversion.read_back is not None:
        arguments += ["--read-back", conversion.read_back]
    if memory_budget is not None:
        arguments += ["--memory-budget", memory_budget]
    load = ForeignLoad()
    start = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-c", CHILD, "checkpoint", *arguments],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
        preexec_fn=None if cgroup is None else lambda: _enter(cgroup),
    )
    process_s = time.perf_counter() - start
    foreign_share = load.share()
    found = [line for line in process.stdout.splitlines() if line.startswith("MEASURED ")]
    result = (
        json.loads(found[0].removeprefix("MEASURED ")) if found else {"code": process.returncode}
    )
    if result["code"] != 0:
        raise RuntimeError(f"exit code {result['code']}:\n{process.stdout}{process.stderr}")
    peak, imports = result["peak"], result["imports"]
    return Measured(result["seconds"], process_s, peak, imports, num_bytes, foreign_share)


def make_cgroup(path: Path, limit_bytes: int) -> None:
    """A cgroup with a limit on memory. Raises OSError if this user may not make it."""
    path.mkdir(exist_ok=True)
    limit = next(path / name for name in LIMIT_FILES if (path / name).exists())
    limit.write_text(str(limit_bytes))


def _enter(cgroup: Path) -> None:
    (cgroup / "cgroup.procs").write_text(str(os.getpid()))
