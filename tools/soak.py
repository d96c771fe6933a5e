"""Load, chaos and a restart on a server of one's own, and whether it stood that.

    python tools/soak.py                    # 10 minutes
    python tools/soak.py --hours 2 --json soak.json
    python tools/soak.py --seconds 120
    python tools/soak.py --seconds 300 --overload-alone    # 30 s each of peak and overload
    python tools/soak.py --overload-alone --layers 10      # a slower model, on a faster machine

Starts `jaxserve serve` with a model of random weights, then: 48 clients that keep it busy (the
peak), five times what it can do (the overload), clients that read nothing, and twice 200 clients of
which some leave, beside rubbish on both ports, with SIGTERM and a new process in between. Every
stream is compared with what the idle server answered. Exit code: 0 if all checks hold, 1 if one
fails, 3 if the clients were too slow to judge the times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parents[1]))

from tools.chaos.phases import Findings
from tools.chaos.soak import Schedule, soak, worst
from tools.chaos.soaked_server import SoakedServer
from tools.chaos.tiny_model import LAYERS, write_model
from tools.chaos.verdicts import judge_log


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--seconds", type=float, default=600.0, help="default: 600")
    length.add_argument("--hours", type=float)
    parser.add_argument("--overload-alone", action="store_true", help="peak and overload alone")
    parser.add_argument(
        "--layers", type=int, default=LAYERS, help=f"of the model (default: {LAYERS})"
    )
    parser.add_argument("--seed", type=int, default=0, help="of what the clients do")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep the server's log there")
    arguments = parser.parse_args()
    total_s = arguments.seconds if arguments.hours is None else 3600 * arguments.hours
    schedule = Schedule.of(total_s)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # The server must end with this.
    cores = sorted(os.sched_getaffinity(0))
    # The clients get a core of their own, if there is one.
    clients, servers = ({cores[-1]}, set(cores[:-1])) if len(cores) > 1 else (set(cores),) * 2
    with tempfile.TemporaryDirectory() as folder:
        log = arguments.log or Path(folder) / "server.log"
        log.write_bytes(b"")
        server = SoakedServer(write_model(Path(folder) / "model", arguments.layers), log, servers)
        os.sched_setaffinity(0, clients)
        try:
            server.start()
            findings = _run(server, schedule, arguments.seed, arguments.overload_alone)
        finally:
            server.close()
        findings.verdicts.append(judge_log(log.read_text(errors="replace")))
    _print(findings)
    exit_code = worst(findings.verdicts)
    if arguments.json is not None:
        result = asdict(findings) | {"schedule": asdict(schedule), "exit_code": exit_code}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return exit_code


def _run(server: SoakedServer, schedule: Schedule, seed: int, overload_alone: bool) -> Findings:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=console, refresh_per_second=1, disable=not console.is_terminal
    ) as bar:
        task, started_s = bar.add_task("", total=schedule.total_s), time.monotonic()

        def on_phase(name: str, _: float) -> None:
            done_s = time.monotonic() - started_s
            bar.update(task, description=name, completed=done_s)
            if not console.is_terminal:
                sys.stderr.write(f"{done_s:6.0f} s  {name}\n")

        return asyncio.run(soak(server, schedule, on_phase, seed, overload_alone=overload_alone))


def _print(findings: Findings) -> None:
    table = Table("check", "measured", "limit", "")
    colours = {"holds": "green", "fails": "red", "void": "yellow"}
    for verdict in findings.verdicts:
        colour = colours[verdict.outcome]
        outcome = f"[{colour}]{verdict.outcome}[/]"
        table.add_row(verdict.check, verdict.measured, verdict.limit, outcome)
    console = Console(width=None if sys.stdout.isatty() else 140)
    console.print(table)
    for phase, figures in findings.clients.items():
        paused_s = figures["paused_s"]
        console.print(
            f"clients in {phase}: {figures['cpu_share']:.0%} of a core, "
            f"{figures['late_fraction']:.2%} late"
            + (f", the machine stood still for {paused_s:.0f} s" if paused_s else "")
        )


if __name__ == "__main__":
    sys.exit(main())
