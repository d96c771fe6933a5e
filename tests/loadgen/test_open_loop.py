"""The load generator against real servers on real sockets."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from typer.testing import CliRunner

from jaxserve.cli.bench import app
from jaxserve.errors import ConfigError, Unauthenticated
from jaxserve.loadgen.generator import run_open_loop
from jaxserve.loadgen.schedule import PlannedRequest
from jaxserve.proto.v1 import inference_pb2 as pb
from jaxserve.proto.v1 import inference_pb2_grpc
from tests.security.keys import KEYS, keyed_service, write_keys
from tests.server.tiny_model import CONTEXT, write_tiny_model


class ScriptedInference(inference_pb2_grpc.InferenceServicer):
    """Waits 0.3 s, sends a token, another 0.05 s later, and one more 0.4 s after that."""

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        if len(request.token_ids.ids) > 100:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        for wait_s, ids in ((0.3, [1]), (0.05, [2]), (0.4, [3, 4])):
            await asyncio.sleep(wait_s)
            yield pb.GenerateResponse(output=pb.TokenOutput(token_ids=ids))
        finished = pb.GenerationFinished(reason=pb.FINISH_REASON_LENGTH)
        yield pb.GenerateResponse(finished=finished, usage=pb.Usage(queue_s=0.125))


@contextmanager
def scripted_server() -> Iterator[str]:
    addresses: list[str] = []
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        server = grpc.aio.server()
        inference_pb2_grpc.add_InferenceServicer_to_server(ScriptedInference(), server)
        addresses.append(f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}")
        await server.start()
        ready.set()
        await asyncio.to_thread(stop.wait)
        await server.stop(None)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        assert ready.wait(10)
        yield addresses[0]
    finally:
        stop.set()
        thread.join(10)


def test_times_at_the_socket_and_an_open_loop() -> None:
    """All leave within 0.2 s though no answer is through before 0.75 s."""
    schedule = [PlannedRequest(0.01 * i, 8, 4, is_measured=True) for i in range(20)]
    schedule.append(PlannedRequest(0.2, 101, 4, is_measured=True))
    with scripted_server() as address:
        run = run_open_loop(address, schedule, vocab_size=100)
    assert max(one.sent_s for one in run.requests) < 0.5
    *answered, refused = run.requests
    assert refused.status == "RESOURCE_EXHAUSTED"
    assert not refused.is_ok
    for one in answered:
        assert (one.status, one.num_tokens, one.queue_s) == ("OK", 4, 0.125)
        assert one.ttft_s == pytest.approx(0.3, abs=0.15)
        assert one.tbt_s.tolist() == pytest.approx([0.05, 0.4], abs=0.15)
    assert 0 < run.health.cpu_share < 1.5


FLAGS = ["--max-model-len", str(CONTEXT), "--token-budget", "16", "--buckets", "4,16"]
FLAGS += ["--max-num-seqs", "4", "--kv-cache-bytes", "2MiB"]


def bench(*arguments: Any) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, arguments)])


def test_bench_serve_starts_a_server_and_measures_it(
    tmp_path: Path, compilation_cache: Path
) -> None:
    model = write_tiny_model(tmp_path / "tiny")
    load = ("--num-requests", 12, "--qps", 12, "--goal-ttft-ms", 60_000, "--goal-tbt-ms", 60_000)
    cache = ("--compilation-cache-dir", compilation_cache)
    result = bench("--model", model, *FLAGS, *cache, *load, "--json")
    assert result.exit_code in (0, 3), (result.exception, result.stderr)
    figures = json.loads(result.stdout)
    assert result.exit_code == (3 if figures["generator"]["void"] else 0), result.stderr
    assert (figures["num_requests"], figures["num_failed"]) == (12, 0)
    assert figures["num_output_tokens"] >= 12
    assert figures["goodput"]["attainment"] == 1.0
    assert 0 < figures["ttft_ms"]["p50"] <= figures["ttft_ms"]["p99"] <= figures["e2e_ms"]["max"]
    low, high = figures["tbt_ms"]["ci95"]["p99"]
    assert 0 < low <= figures["tbt_ms"]["p99"] <= figures["tbt_ms"]["max"]
    assert low <= high
    assert figures["scheduling_delay_ms"]["p50"] <= figures["ttft_ms"]["p50"]
    assert figures["server"]["token_budget"] == 16
    assert figures["server"]["policy"] == "sarathi"


def test_the_key_comes_from_a_file(tmp_path: Path) -> None:
    service = keyed_service(write_keys(tmp_path / "keys.toml"))
    try:
        key = tmp_path / "key"
        key.write_text(KEYS["alpha"] + "\n")
        load = ("--num-requests", 2, "--input-len", 4, "--output-len", 4, "--qps", 50, "--json")
        result = bench("--server", service.address, "--api-key-file", key, *load)
        assert json.loads(result.stdout)["num_failed"] == 0, result.stderr
        assert isinstance(bench("--server", service.address, *load).exception, Unauthenticated)
    finally:
        service.close()


@pytest.mark.parametrize("content", ["", "two\nkeys", "a key", "schl\u00fcssel"])
def test_a_file_without_one_key_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "key").write_text(content)
    mistake = bench("--server", "127.0.0.1:1", "--api-key-file", tmp_path / "key").exception
    assert isinstance(mistake, ConfigError)
    assert "--api-key-file" in str(mistake)
    assert not content or content not in str(mistake)


def test_mistakes_are_named(tmp_path: Path) -> None:
    assert isinstance(bench("--api-key-file", tmp_path).exception, ConfigError)
    mistake = bench("--server", "127.0.0.1:1", "--token-budget", 16).exception
    assert isinstance(mistake, ConfigError)
    assert "--token-budget" in str(mistake)
    assert isinstance(bench("--input-len", 4).exception, ConfigError)
