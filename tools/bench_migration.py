"""Speed and memory of `jaxserve checkpoint convert` on a synthetic model of any size.

Makes a Llama folder of random float32 weights, converts it in a process of its own, and prints
time and peak memory beside three bounds: `cp -r` of the folder, the same with a sync of what it
wrote, and the sum of a plain read and a plain write of as many bytes (read to nowhere; written
from memory and synced, as a conversion syncs its target). Rounds measure all by turns; the medians
are printed, with the least and the most. Sources are in the page cache.

    .venv/bin/python tools/bench_migration.py --gigabytes 1 --rounds 5
    .venv/bin/python tools/bench_migration.py --gigabytes 4 --largest-gigabytes 1.5 --tied \\
        --memory-budget 700MB --memory-cgroup /sys/fs/cgroup/memory/convert \\
        --rounds 5 --resume build/migration --stop-after-s 90

A conversion is called FROM-TO, or FROM-gguf-TYPE for the type of the matrices, and ends with
+READ_BACK where not the default is wanted.

With `--memory-cgroup`, the kernel holds the process to the budget: the folder is made in a cgroup
hierarchy (version 1 or 2) that you may write to. `--resume` keeps the model, what is made of it as
a source of others, and `records.jsonl`; the next call measures only what is missing, after the
bounds anew, so that the rounds can be done in several quiet spells: a ratio is always to the bounds
of the same spell. What was measured while others had more than 15 % of the processor is void, and
measured again by the next call. `--report` prints the table of such a file.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from jaxserve.cli.engine_options import parse_byte_size
from tools.migration_speed.bounds import measure_bounds, read_all
from tools.migration_speed.conversion import Conversion, make_cgroup, measure_conversion
from tools.migration_speed.records import Record, keep_record, load_records, text_of
from tools.migration_speed.synthetic import write_synthetic

CONVERSIONS = (
    "safetensors-safetensors",
    "safetensors-safetensors+full",
    "safetensors-orbax",
    "orbax-safetensors",
    "safetensors-gguf-F16",
    "safetensors-gguf-Q8_0",
)
RECORDS = "records.jsonl"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="size of the model")
    parser.add_argument("--largest-gigabytes", type=float, default=0.1, help="of one tensor")
    parser.add_argument("--tied", action="store_true", help="the head is the embedding")
    conversions = [Conversion.parse(name) for name in CONVERSIONS]
    parser.add_argument("--conversions", nargs="+", type=Conversion.parse, default=conversions)
    parser.add_argument("--memory-budget", help="as of the command")
    parser.add_argument("--memory-cgroup", type=Path, help="made with the budget as its limit")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--resume", type=Path, help="keeps and takes the sources and the records")
    parser.add_argument(
        "--stop-after-s", type=float, default=math.inf, help="begins no conversion later than that"
    )
    parser.add_argument("--report", type=Path, help="only prints the table of these records")
    args = parser.parse_args()
    if args.report is not None:
        print(text_of(load_records(args.report)))
        return
    if args.memory_cgroup is not None:
        if args.memory_budget is None:
            parser.error("--memory-cgroup needs --memory-budget")
        make_cgroup(args.memory_cgroup, parse_byte_size(args.memory_budget))
    try:
        with _folder(args.resume) as folder:
            is_complete = run(folder, args, last_start_s=time.monotonic() + args.stop_after_s)
            print(text_of(load_records(folder / RECORDS)))
    finally:
        if args.memory_cgroup is not None:
            args.memory_cgroup.rmdir()
    if not is_complete:
        sys.exit("not all is measured: run it again with the same --resume")


@contextlib.contextmanager
def _folder(kept: Path | None) -> Iterator[Path]:
    if kept is None:
        with tempfile.TemporaryDirectory(prefix="bench-migration-") as name:
            yield Path(name)
        return
    kept.mkdir(parents=True, exist_ok=True)
    yield kept


def run(folder: Path, args: argparse.Namespace, *, last_start_s: float) -> bool:
    """Measure what is missing, round by round. Returns whether nothing is missing any more."""
    source = folder / "source"
    if not source.exists():
        largest = int(args.largest_gigabytes * 1e9)
        made = folder / "work"
        shutil.rmtree(made, ignore_errors=True)
        write_synthetic(made, int(args.gigabytes * 1e9), largest, is_tied=args.tied)
        made.rename(source)
    num_bytes = (source / "model.safetensors").stat().st_size
    sources = {"safetensors": source, "orbax": folder / "source-orbax"}
    if any(one.source == "orbax" for one in args.conversions) and not sources["orbax"].exists():
        measure_conversion(Conversion("safetensors", "orbax"), source, sources["orbax"], num_bytes)
    records = folder / RECORDS
    kept = [record for record in load_records(records) if not record.is_void]
    measured = {(record.round, record.conversion) for record in kept}
    rounds = itertools.product(range(args.rounds), args.conversions)
    missing = [(number, one) for number, one in rounds if (number, one.name) not in measured]
    is_complete = True
    for index, (number, conversion) in enumerate(missing):
        if time.monotonic() > last_start_s:
            return False
        if index % len(args.conversions) == 0:
            began = datetime.now(UTC).isoformat(timespec="seconds")
            bounds = measure_bounds(source, _empty(folder / "work"))
            print(bounds, file=sys.stderr, flush=True)
        read_all(sources[conversion.source])
        name = "made.gguf" if conversion.to == "gguf" else "made"
        found = measure_conversion(
            conversion,
            *(sources[conversion.source], _empty(folder / "work") / name, num_bytes),
            memory_budget=args.memory_budget,
            cgroup=args.memory_cgroup,
        )
        print(conversion.name, found, file=sys.stderr, flush=True)
        record = Record(number, conversion.name, began, found, bounds)
        keep_record(records, record)
        is_complete &= not record.is_void
        shutil.rmtree(folder / "work")
    return is_complete


def _empty(folder: Path) -> Path:
    """Without what a killed call has left."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


if __name__ == "__main__":
    main()
