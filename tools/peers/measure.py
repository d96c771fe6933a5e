"""Measures: loads, starts and memory of engines, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from tools.peers.client import Answer, run_load
from tools.peers.engine import Engine, EngineServer
from tools.peers.load import Row, make_load
from tools.peers.records import Record, Records

NUM_WARM_UPS = 2
WARM_UP_ROW = Row("warmup", "", 4, 40, 8)


class Server(Protocol):
    """A running engine: `EngineServer`, or one that another process holds."""

    @property
    def engine(self) -> Engine: ...

    @property
    def port(self) -> int: ...

    def peak_bytes(self) -> int:
        """The largest resident memory so far."""
        ...

    def close(self) -> None:
        """Ends it, if it is ours."""
        ...


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    rows: Sequence[Row]
    num_rounds: int
    vocab_size: int
    trace: Path | None
    time_limit_s: float
    """No load begins later than this."""
    cache_root: Path
    """Where engines keep what they compile."""

    def missing(self, engine: Engine, records: Records) -> list[tuple[int, Row]]:
        """Rounds and rows of an engine that are not in the records."""
        return [
            (round_index, row)
            for round_index in range(self.num_rounds)
            for row in self.rows
            if not has_load(records, engine, row, round_index)
        ]


def has_load(records: Records, engine: Engine, row: Row, round_index: int) -> bool:
    return records.has(kind="load", engine=engine.name, row=row.name, round=round_index)


def measure_loads(
    engines: Sequence[Engine], plan: Plan, records: Records, held: Mapping[str, Server]
) -> bool:
    """Starts the engines that are not held, and measures what is missing, engine after engine for
    each row, in the other direction in every second round. True when nothing is missing any more.
    """
    deadline_s = time.monotonic() + plan.time_limit_s
    wanted = [engine for engine in engines if plan.missing(engine, records)]
    servers: list[Server] = []
    try:
        for engine in wanted:
            if engine.name in held:
                servers.append(held[engine.name])
                continue
            started = start(engine, records, plan.cache_root)
            servers.append(started)
            warm_up(started, plan.vocab_size)
        for round_index in range(plan.num_rounds):
            for row in plan.rows:
                for server in servers[:: -1 if round_index % 2 else 1]:
                    if has_load(records, server.engine, row, round_index):
                        continue
                    if time.monotonic() > deadline_s:
                        return False
                    records.add(measure_one(server, row, round_index, plan))
    finally:
        for server in servers:
            server.close()
    return True


def warm_up(server: Server, vocab_size: int) -> None:
    """Short requests, of which nothing is recorded."""
    for index in range(NUM_WARM_UPS):
        run_load(server.port, make_load(WARM_UP_ROW, index, vocab_size), server.engine.fields)


def measure_one(server: Server, row: Row, round_index: int, plan: Plan) -> Record:
    """One load on one engine."""
    load = make_load(row, round_index, plan.vocab_size, plan.trace)
    load_average = os.getloadavg()[0]
    with busy_process(row.has_busy_process):
        result = run_load(server.port, load, server.engine.fields)
    record = load_record(server.engine, row, round_index, result.answers, result.client_cpu_s)
    record |= {"load_average": load_average, "peak_bytes": server.peak_bytes()}
    print(
        f"{server.engine.name}, {row.label}, round {round_index}: {record['elapsed_s']:.2f} s",
        file=sys.stderr,
    )
    return record


def load_record(
    engine: Engine, row: Row, round_index: int, answers: Sequence[Answer], client_cpu_s: float
) -> Record:
    """Times of a load as JSON values; latencies count from when a request was due."""
    return {
        "kind": "load",
        "engine": engine.name,
        "row": row.name,
        "round": round_index,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "lengths": [[one.num_prompt_tokens, one.num_output_tokens] for one in answers],
        "elapsed_s": max(one.event_s[-1] for one in answers) - min(one.due_s for one in answers),
        "ttft_s": [one.event_s[0] - one.due_s for one in answers],
        "tpot_s": [
            (one.event_s[-1] - one.event_s[0]) / (one.num_output_tokens - 1)
            for one in answers
            if one.num_output_tokens > 1
        ],
        "client_cpu_s": client_cpu_s,
    }


def start(engine: Engine, records: Records, cache_root: Path) -> EngineServer:
    """Starts an engine with what earlier starts have cached; how long it took is recorded."""
    cache = cache_root / engine.name.replace(" ", "-")
    is_warm = cache.exists()
    server = EngineServer(engine, cache)
    records.add(start_record(server, "start-warm" if is_warm else "start-cold"))
    return server


def start_record(server: EngineServer, kind: str) -> Record:
    print(f"{server.engine.name}: {kind} {server.ready_s:.1f} s", file=sys.stderr)
    return {
        "kind": kind,
        "engine": server.engine.name,
        "ready_s": server.ready_s,
        "load_average": os.getloadavg()[0],
        "date": time.strftime("%Y-%m-%d %H:%M"),
    }


def measure_cold_start(engine: Engine, records: Records) -> None:
    """With an empty cache of compiled code; the model's file may be in memory."""
    with (
        tempfile.TemporaryDirectory(prefix="compare_peers_") as cache,
        EngineServer(engine, Path(cache)) as server,
    ):
        records.add(start_record(server, "start-cold"))


@contextmanager
def busy_process(wanted: bool) -> Iterator[None]:
    """Another process that computes without end on one core, if it is wanted."""
    if not wanted:
        yield
        return
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as process:
        try:
            yield
        finally:
            process.kill()
