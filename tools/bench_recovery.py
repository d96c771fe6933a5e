"""What faults and safety cost a training run: time to recover, and the price of snapshots.

    python tools/bench_recovery.py kills CONFIG.toml --processes 4 --num-kills 10
    python tools/bench_recovery.py overhead CONFIG.toml --num-runs 3

`kills` kills one trainer after the other with SIGKILL and measures, from the ledger's time
stamps, how long it takes until the next step is committed. `overhead` trains with a snapshot,
its digest and a ledger line at every step (and digests of the parameters in every tenth line) and
without (one snapshot at the end), alternating, and compares the time of a step: each run with them
with its neighbour without, and an interval for the median of these pairs. It ends with 1 if the
interval goes beyond 3 %, or if there are too few pairs (less than 6) to tell. Both need cores that
nobody else uses.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NEVER = 1_000_000
KILL_AFTER_STEPS = 3
MAX_OVERHEAD = 0.03
MIN_CONFIDENCE = 0.95


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    commands = parser.add_subparsers(dest="command", required=True)
    kills = commands.add_parser("kills", help="time from SIGKILL to the next committed step")
    kills.add_argument("config", type=Path)
    kills.add_argument("--processes", type=int, default=4)
    kills.add_argument("--num-kills", type=int, default=10)
    kills.add_argument("--seed", type=int, default=0)
    overhead = commands.add_parser("overhead", help="price of snapshots, digests and ledger")
    overhead.add_argument("config", type=Path)
    overhead.add_argument("--num-runs", type=int, default=3)
    overhead.add_argument("--steps", type=int, default=200)
    overhead.add_argument("--set", action="append", default=[], metavar="A.B=C", dest="settings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.command == "kills":
            result = measure_kills(
                arguments.config, Path(folder), arguments.processes, arguments.num_kills,
                arguments.seed,
            )  # fmt: skip
        else:
            result = measure_overhead(
                arguments.config, Path(folder), arguments.num_runs, arguments.steps,
                arguments.settings,
            )  # fmt: skip
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if not result.get("is_shown", True):
        sys.exit("that safety costs at most 3 % is not shown")


def measure_kills(
    config: Path, folder: Path, num_processes: int, num_kills: int, seed: int
) -> dict[str, Any]:
    """Kills a random trainer, again and again, each time some steps after the last recovery."""
    run = folder / "run"
    settings = [
        f"placement.processes={num_processes}", f"total_steps={NEVER}",
        f"durability.checkpoint_every={NEVER}", "supervision.max_failures=1000",
    ]  # fmt: skip
    process = _start(config, run, settings)
    choice = random.Random(seed)  # noqa: S311 -- which one dies
    seconds, lost = [], []
    wanted = KILL_AFTER_STEPS
    try:
        for _ in range(num_kills):
            _wait_for_step(run, wanted, process)
            pids = [r for r in _records(run) if r["kind"] == "generation"][-1]["pids"]
            killed_s = time.time()
            os.kill(choice.choice(pids), signal.SIGKILL)
            time.sleep(0.2)
            newest = _newest_step(run)
            _wait_for_step(run, newest + 1, process)
            records = _records(run)
            after = next(r for r in records if r["kind"] == "step" and r["step"] == newest + 1)
            seconds.append(after["time_s"] - killed_s)
            lost.append(sum(r["from_step"] - r["to_step"] for r in records
                            if r["kind"] == "rollback"))  # fmt: skip
            wanted = newest + 1 + KILL_AFTER_STEPS
    finally:
        process.terminate()
        process.wait(timeout=120)
    ordered = sorted(seconds)
    return {
        "processes": num_processes,
        "num_kills": num_kills,
        "seconds": [round(one, 2) for one in seconds],
        "p50_s": round(statistics.median(ordered), 2),
        "p95_s": round(ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))], 2),
        "committed_steps_lost": max(lost, default=0),
    }


def measure_overhead(
    config: Path, folder: Path, num_runs: int, num_steps: int, settings: Sequence[str]
) -> dict[str, Any]:
    """Trains with and without, alternating."""
    step_ms: dict[str, list[float]] = {"off": [], "on": []}
    every = {"off": NEVER, "on": 1}
    digest_every = {"off": 0, "on": 10}
    for number in range(num_runs):
        for kind in ("off", "on") if number % 2 == 0 else ("on", "off"):
            run = folder / f"{kind}-{number}"
            process = _start(
                config, run,
                [f"durability.snapshot_every={every[kind]}", f"total_steps={num_steps}",
                 f"durability.checkpoint_every={NEVER}", "logging.plot=false",
                 f"logging.params_digest_every={digest_every[kind]}", *settings],
            )  # fmt: skip
            if process.wait(timeout=600) != 0:
                raise SystemExit(f"the run failed; see {run}")
            goodput = _records(run)[-1]["goodput"]
            busy_s = sum(goodput[f"{name}_s"] for name in ("step", "data_wait", "ckpt_stall"))
            step_ms[kind].append(1e3 * busy_s / (num_steps - 1))
            shutil.rmtree(run)
    medians = {kind: statistics.median(values) for kind, values in step_ms.items()}
    pairs = [on / off - 1 for on, off in zip(step_ms["on"], step_ms["off"], strict=True)]
    low, high, confidence = median_interval(pairs)
    return {
        "step_ms": {kind: [round(one, 3) for one in values] for kind, values in step_ms.items()},
        "median_ms": {kind: round(value, 3) for kind, value in medians.items()},
        "overhead": round(medians["on"] / medians["off"] - 1, 4),
        "paired": [round(one, 4) for one in pairs],
        "paired_median": round(statistics.median(pairs), 4),
        "interval": [round(low, 4), round(high, 4)],
        "confidence": round(confidence, 4),
        "wanted": MAX_OVERHEAD,
        "is_shown": high <= MAX_OVERHEAD and confidence >= MIN_CONFIDENCE,
    }


def median_interval(values: Sequence[float]) -> tuple[float, float, float]:
    """An interval that holds the median of what `values` are drawn from, and how surely.

    The shortest one between equally many of the least and of the largest that is at least
    `MIN_CONFIDENCE` sure; of too few values, all of them and what that gives. It assumes nothing
    about the distribution: each value is above the median as often as a coin shows heads.
    """
    ordered, count = sorted(values), len(values)

    def confidence(left_out: int) -> float:
        return 1 - 2 * sum(math.comb(count, i) for i in range(left_out + 1)) / float(2**count)

    left_out = 0
    while 2 * (left_out + 1) < count and confidence(left_out + 1) >= MIN_CONFIDENCE:
        left_out += 1
    return ordered[left_out], ordered[count - 1 - left_out], confidence(left_out)


def _start(config: Path, run: Path, settings: Sequence[str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "jaxserve", "train", str(config), "--set", f'run_dir="{run}"']
    for setting in settings:
        command += ["--set", setting]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _records(run: Path) -> list[dict[str, Any]]:
    ledger = run / "ledger.jsonl"
    if not ledger.exists():
        return []
    return [json.loads(line) for line in ledger.read_bytes().rpartition(b"\n")[0].splitlines()]


def _newest_step(run: Path) -> int:
    return max((r["step"] for r in _records(run) if r["kind"] == "step"), default=-1)


def _wait_for_step(run: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    while _newest_step(run) < step:
        if process.poll() is not None:
            raise SystemExit(f"the run ended with exit code {process.returncode}")
        time.sleep(0.05)


if __name__ == "__main__":
    main()
