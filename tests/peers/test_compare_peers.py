"""The comparison's client, records and table; the engines themselves are not run."""

from __future__ import annotations

import asyncio
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tools.compare_peers import report
from tools.peers.ceilings import Ceilings, ModelSize, floor_s
from tools.peers.client import Answer, RequestFailed, run_load
from tools.peers.engine import Engine, EngineFailed, EngineServer, peak_of
from tools.peers.held import held_servers
from tools.peers.load import ROWS, LoadRequest, make_load
from tools.peers.measure import Plan, load_record
from tools.peers.quality import agreement_record
from tools.peers.records import Records, read_records
from tools.peers.table import loads_of, ratios
from tools.peers.vllm_cpu import requirements_to_install

MODEL = ModelSize(100, 50, 2, 8, 4)
MACHINE = Ceilings(bytes_per_s=1e6, flops_per_s=1e6, num_cores=2)
ENGINE = Engine("theirs", "bits", "float32", 1000, 2, ("true",))
ROW = {row.name: row for row in ROWS}


def sse(*events: str) -> bytes:
    return "".join(f"data: {event}\n\n" for event in events).encode()


def chunked(*parts: bytes) -> bytes:
    body = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in [*parts, b""])
    return b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body


@contextmanager
def http_server(reply: bytes) -> Iterator[int]:
    """Answers every request with the same bytes."""
    loop = asyncio.new_event_loop()
    ready = threading.Event()
    ports: list[int] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(line for line in head.split(b"\r\n") if b"Content-Length" in line)
        await reader.readexactly(int(length.split(b":")[1]))
        writer.write(reply)
        await writer.drain()
        writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()

    def run() -> None:
        loop.run_until_complete(listen())
        loop.run_forever()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert ready.wait(30)
        yield ports[0]
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(30)
        loop.close()


LOAD = [LoadRequest(0.0, (1, 2, 3), 2), LoadRequest(0.01, (4,), 2)]
TOKENS = ('{"choices":[{"text":"a"}]}', '{"choices":[{"text":"b"}]}')
USAGE = '{"choices":[],"usage":{"completion_tokens":2}}'


def test_client_times_events_and_counts_tokens() -> None:
    reply = chunked(sse(TOKENS[0]), sse(TOKENS[1]), sse(USAGE, "[DONE]"))
    with http_server(reply) as port:
        result = run_load(port, LOAD, {})
    assert [len(one.event_s) for one in result.answers] == [2, 2]
    assert [one.num_output_tokens for one in result.answers] == [2, 2]
    assert all(one.event_s[0] >= one.due_s for one in result.answers)


def test_client_reads_replies_without_chunks() -> None:
    with http_server(b"HTTP/1.1 200 OK\r\n\r\n" + sse(*TOKENS, USAGE)) as port:
        assert run_load(port, LOAD, {}).answers[0].num_output_tokens == 2


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\nno such field", "status 400: no such field"),
        (chunked(sse('{"error": {"message": "broken"}}')), "broken"),
        (chunked(sse(TOKENS[0], '{"choices":[],"usage":{"completion_tokens":1}}')), "not 2"),
    ],
)
def test_client_raises_for_what_is_no_full_answer(reply: bytes, message: str) -> None:
    with http_server(reply) as port, pytest.raises(RequestFailed, match=message):
        run_load(port, LOAD, {})


def test_prompts_differ_by_round_and_are_the_same_for_every_engine() -> None:
    first, again, second = (make_load(ROW["eight"], index, 49152) for index in (0, 0, 1))
    assert first == again
    prompts = {one.token_ids for one in first + second}
    assert len(prompts) == 16


def test_mixed_load_fits_and_arrives_over_time() -> None:
    load = make_load(ROW["mixed"], 0, 49152)
    assert max(len(one.token_ids) + one.num_output_tokens for one in load) <= 1024
    assert load[-1].due_s > 1
    assert len({len(one.token_ids) for one in load}) > 5


def a_record(engine: str, round_index: int, elapsed_s: float) -> dict[str, object]:
    """One stream, first token after 0.1 s."""
    answer = Answer(0.0, 16, [0.1, elapsed_s], 128)
    record = load_record(replace(ENGINE, name=engine), ROW["one"], round_index, [answer], 0.0)
    return record | {"peak_bytes": 5_000_000}


def test_records_survive_and_say_what_is_missing(tmp_path: Path) -> None:
    Records(tmp_path).add(a_record("theirs", 0, 1.0))
    plan = Plan([ROW["one"], ROW["eight"]], 2, 100, None, 1.0, tmp_path)
    missing = plan.missing(ENGINE, Records(tmp_path))
    assert [(index, row.name) for index, row in missing] == [(0, "eight"), (1, "one"), (1, "eight")]
    with (tmp_path / "records.jsonl").open("a") as file:
        file.write('{"kind": "lo')
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        read_records(tmp_path / "records.jsonl")


def test_ratios_are_of_the_same_round() -> None:
    records = [a_record("ours", 0, 1.0), a_record("ours", 1, 4.0), a_record("theirs", 0, 2.0)]
    found = ratios(
        loads_of(records, "ours", ROW["one"]), loads_of(records, "theirs", ROW["one"]), ROW["one"]
    )
    assert (found["rate"].middle, found["rate"].low, found["rate"].high) == (2.0, 2.0, 2.0)
    assert found["tpot_s"].middle == pytest.approx(0.9 / 1.9)


def test_report_has_every_figure() -> None:
    records: list[dict[str, object]] = [
        {"kind": "machine", "cpu": "a processor", **asdict(MACHINE)},
        {"kind": "model", **asdict(MODEL)},
        *(
            {"kind": "engine", "engine": name, "weights": "bits", "compute": "float32"}
            | {"weights_bytes": 1000, "kv_value_bytes": 2}
            for name in ("jaxserve XLA", "llama.cpp")
        ),
        a_record("jaxserve XLA", 0, 1.0),
        a_record("llama.cpp", 0, 2.0),
        {"kind": "start-warm", "engine": "llama.cpp", "ready_s": 1.25},
        agreement_record("llama.cpp", ["abcd", "xy"], ["abcd", "xz"]),
        {"kind": "perplexity", "engine": "jaxserve XLA", "perplexity": 17.0},
    ]
    text = "\n".join(report(records))
    for figure in ("128", "64", "2.00", "1.2", "17.000", "1 of 2, 75% of the text"):
        assert f" {figure} " in text, figure


def test_floor_is_the_larger_of_work_and_bytes() -> None:
    flops = 2 * (5 * 100 + 2 * 50) + 4 * 2 * 8 * 15
    assert MODEL.flops(4, 2) == flops
    few_bytes = floor_s([(4, 2)], MODEL, MACHINE, weights_bytes=1, kv_value_bytes=2)
    assert few_bytes == pytest.approx(flops / 1e6)
    many_bytes = floor_s([(4, 2)], MODEL, MACHINE, weights_bytes=10**6, kv_value_bytes=2)
    assert many_bytes == pytest.approx(2 + MODEL.kv_bytes(4, 2, 2) / 1e6)


def test_requirements_without_those_left_out() -> None:
    required = ["torch==2.13.0+cpu ; x", "torchaudio", "numba==1", "boto3; extra == 's3'"]
    assert requirements_to_install(required) == ["numba==1"]


def test_an_engine_that_ends_tells_why(tmp_path: Path) -> None:
    broken = replace(ENGINE, command=("sh", "-c", "echo no such model at {cache}; exit 3"))
    with pytest.raises(EngineFailed, match=f"no such model at {tmp_path}"):
        EngineServer(broken, tmp_path)


def test_a_held_server_is_found_while_it_lives(tmp_path: Path) -> None:
    assert held_servers([ENGINE], tmp_path) == {}
    process = subprocess.Popen(["sleep", "60"])
    note = {"port": 1234, "pid": process.pid}
    (tmp_path / "held-theirs.json").write_text(json.dumps(note))
    server = held_servers([ENGINE], tmp_path)["theirs"]
    assert (server.engine, server.port) == (ENGINE, 1234)
    assert server.peak_bytes() > 0
    server.close()
    assert process.poll() is None  # it is not ours to end
    process.kill()
    process.wait()
    assert held_servers([ENGINE], tmp_path) == {}


def test_peak_of_a_status_file() -> None:
    assert peak_of("Name:\tx\nVmHWM:\t    12 kB\nVmRSS:\t 3 kB\n") == 12 * 1024
    assert peak_of("Name:\tx\nState:\tZ (zombie)\n") == 0
