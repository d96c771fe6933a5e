"""Cold and warm start of `jaxserve serve`, from exec to READY, in fresh processes.

    python tools/bench_startup.py [--runs 3] [--json] [-- serve options]

Cold: an empty compilation cache. Warm: the same cache again. The model is
already on the disk in both (its download is not counted).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter

from jaxserve.engine.config import EngineConfig
from jaxserve.model_store import resolve

TIMEOUT_S = 300.0


def start_once(cache_dir: Path, options: list[str]) -> tuple[float, dict[str, float]]:
    """Seconds to READY and the phases that the server printed."""
    command = [sys.executable, "-m", "jaxserve", "serve", "--grpc-port", "0", "--http-port", "0"]
    command += ["--compilation-cache-dir", str(cache_dir), *options]
    start = perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True) as server:
            assert server.stdout is not None
            ready_s = None
            for line in server.stdout:
                if line.startswith("READY"):
                    ready_s = perf_counter() - start
                    break
            server.send_signal(signal.SIGTERM)
        log.seek(0)
        text = log.read()
    if ready_s is None:
        raise SystemExit(f"the server did not become ready:\n{text}")
    phases = re.findall(r"^\s*(\S.*?)\s{2,}([0-9.]+) s$", text, re.MULTILINE)
    return ready_s, {name: float(seconds) for name, seconds in phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("options", nargs="*", help="options of `jaxserve serve`, after --")
    args = parser.parse_args()
    resolve(EngineConfig().model)
    times: dict[str, list[float]] = {"cold": [], "warm": []}
    phases: dict[str, dict[str, float]] = {}
    for _ in range(args.runs):
        with tempfile.TemporaryDirectory() as cache_dir:
            for kind in times:
                seconds, phases[kind] = start_once(Path(cache_dir), args.options)
                times[kind].append(seconds)
    figures = {
        kind: {"median_s": median(values), "runs_s": values, "phases_of_last_s": phases[kind]}
        for kind, values in times.items()
    }
    if args.json:
        print(json.dumps({"load": os.getloadavg(), **figures}, indent=2))
        return
    for kind, values in times.items():
        runs = ", ".join(f"{value:.1f}" for value in values)
        print(f"{kind}: READY after {median(values):.1f} s (runs: {runs})")
        for name, value in phases[kind].items():
            print(f"    {name:28s} {value:6.2f} s")


if __name__ == "__main__":
    main()
