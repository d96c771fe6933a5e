"""`jaxserve serve` as a process: ready line, real streams, signals, exit codes."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import pytest

from checkpoint.param_loading import flatten, unflatten
from checkpoint.store import Store
from jaxserve.client import Client
from jaxserve.engine.request import FinishReason
from jaxserve.errors import NotAccepting
from models.checkpoint_model import CHECKPOINTS, write_model_folder
from models.loading import ModelSource, open_model
from tests.server.scripted_service import wait_for
from tests.server.tiny_model import CONTEXT, write_tiny_model

PROGRAM = [sys.executable, "-m", "jaxserve.cli.main"]
FLAGS = ["--max-model-len", "512", "--token-budget", "16", "--buckets", "4,16"]
FLAGS += ["--max-num-seqs", "4", "--kv-cache-bytes", "2MiB"]


@dataclass(frozen=True)
class Setup:
    model: Path
    compilation_cache: Path


@pytest.fixture(scope="module")
def setup(tmp_path_factory, compilation_cache) -> Setup:
    return Setup(write_tiny_model(tmp_path_factory.mktemp("tiny")), compilation_cache)


@contextlib.contextmanager
def _process(
    setup: Setup, *flags: str, program: Sequence[str] = PROGRAM
) -> Iterator[subprocess.Popen[str]]:
    command = [*program, "serve", "--model", str(setup.model), *FLAGS]
    command += ["--compilation-cache-dir", str(setup.compilation_cache)]
    command += flags or ("--grpc-port", "0", "--http-port", "0")
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _addresses(process: subprocess.Popen[str]) -> tuple[str, str]:
    assert process.stdout is not None
    match = re.match(r"READY grpc=(\S+) http=(\S+)\n", process.stdout.readline())
    assert match, process.communicate()[1]
    return match[1], match[2]


def test_serve_stream_chat_and_drain(setup):
    with _process(setup) as process:
        grpc_address, http_address = _addresses(process)
        with Client(grpc_address) as client:
            assert client.is_serving()
            assert client.model_info().max_model_len == CONTEXT
            _check_streaming(client)
            _check_chat_command(grpc_address)
            _check_http_chat(http_address)
            _send_goaway(grpc_address, b"x\nERROR forged: a line of a peer's")
            with urllib.request.urlopen(f"http://{http_address}/metrics", timeout=5) as reply:
                assert "jaxserve_unexpected_compiles_total 0.0" in reply.read().decode()
            _check_drain(client, process)
        output = process.communicate(timeout=30)[1]
    assert process.returncode == 0, output
    assert "token budget" in output
    assert "KV pool" in output
    assert "Traceback" not in output
    assert "forged" not in output


def _check_streaming(client: Client) -> None:
    """Greedy answers are the same, whole or streamed beside others."""
    settings = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
    outputs = list(client.generate("hello", **settings))
    ids = [token_id for output in outputs for token_id in output.token_ids]
    assert len(ids) == 40
    assert len(outputs) > 20
    calls = [client.generate("hello", **settings) for _ in range(3)]
    for call in calls:
        assert [token_id for output in call for token_id in output.token_ids] == ids
    load = client.load()
    assert (load.num_running, load.num_compiles_after_ready) == (0, 0)
    assert load.num_pages_free + load.num_pages_cached == load.num_pages_total


def _check_chat_command(grpc_address: str) -> None:
    flags = ["--server", grpc_address, "--stats", "--max-tokens", "8", "--seed", "1"]
    result = subprocess.run(
        [*PROGRAM, "chat", *flags],
        input="hi\n/reset\n/what\nagain\n/exit\nnever asked\n",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("TTFT") == 2
    assert "starts anew" in result.stderr
    assert "there are /reset and /exit" in result.stderr


def _check_http_chat(http_address: str) -> None:
    with openai.OpenAI(base_url=f"http://{http_address}/v1", api_key="none") as client:
        [model] = client.models.list().data
        chat = {"model": model.id, "messages": [{"role": "user", "content": "hi"}], "seed": 1}
        whole = client.chat.completions.create(**chat, max_tokens=8).choices[0].message.content
        chunks = list(client.chat.completions.create(**chat, max_tokens=8, stream=True))
    assert whole == "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason is not None


def _send_goaway(grpc_address: str, debug_data: bytes) -> None:
    """An HTTP/2 connection that ends with a text, which gRPC's core would log as it is."""
    host, _, port = grpc_address.rpartition(":")
    settings = struct.pack(">IBI", 4, 0, 0)
    goaway = struct.pack(">BBIII", 7, 0, 0, 0, 77) + debug_data
    with socket.create_connection((host, int(port)), timeout=10) as end:
        end.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        end.sendall(struct.pack(">I", 8 + len(debug_data))[1:] + goaway)
        end.shutdown(socket.SHUT_WR)
        while end.recv(4096):
            pass


def _check_drain(client: Client, process: subprocess.Popen[str]) -> None:
    """Streams that run at SIGTERM come to their own end."""
    num_tokens = 400
    calls = [
        client.generate("abc", max_tokens=num_tokens, ignore_eos=True, seed=seed)
        for seed in range(4)
    ]
    results: dict[int, tuple[int, FinishReason | None]] = {}

    def read(index: int) -> None:
        outputs = list(calls[index])
        results[index] = (sum(len(o.token_ids) for o in outputs), outputs[-1].finish_reason)

    readers = [threading.Thread(target=read, args=(index,)) for index in range(len(calls))]
    for reader in readers:
        reader.start()
    wait_for(lambda: client.load().num_running == 4)
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: not client.is_serving())
    for reader in readers:
        reader.join(timeout=60)
    assert results == dict.fromkeys(range(4), (num_tokens, FinishReason.LENGTH))


def test_a_busy_port_ends_with_the_fix(setup, service):
    port = str(service.server.grpc_port)
    with _process(setup, "--grpc-port", port, "--http-port", "0") as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    expected = (
        f"error: cannot listen on 127.0.0.1:{port}: another program uses the port. "
        "Choose another with --grpc-port (0: any free port)\n"
    )
    assert errors == expected, "one line, and none of gRPC's own"


@pytest.mark.long
def test_sigterm_during_start_up_exits_0(setup):
    with _process(setup) as process:
        assert process.stderr is not None
        process.stderr.readline()  # The ports answer from here on.
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


@pytest.mark.long
def test_a_second_signal_is_immediate(setup):
    with _process(setup) as process, Client(_addresses(process)[0]) as client:
        call = client.generate("abc", max_tokens=CONTEXT, ignore_eos=True)
        next(iter(call))
        process.send_signal(signal.SIGTERM)
        wait_for(lambda: not client.is_serving())
        start_s = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 128 + signal.SIGTERM
        assert time.monotonic() - start_s < 10.0


HANGING_SERVER = """
import threading
import jaxserve.engine.startup as startup
from jaxserve.cli.main import main

start_engine = startup.start_engine

class Hanging:
    def __init__(self, executor):
        self.depth, self.submit = executor.depth, executor.submit
        self.can_accept = executor.can_accept
    def next_completion(self):
        threading.Event().wait()

def start_and_hang(config, on_phase, *, leader=None):
    running = start_engine(config, on_phase, leader=leader)
    loop = running.engine._loop
    loop._executor = Hanging(loop._executor)
    return running

startup.start_engine = start_and_hang
main()
"""


@pytest.mark.long
def test_sigterm_ends_a_server_whose_device_hangs(setup):
    ports = ("--grpc-port", "0", "--http-port", "0")
    with (
        _process(
            setup, *ports, "--drain-timeout-s", "0", program=[sys.executable, "-c", HANGING_SERVER]
        ) as process,
        Client(_addresses(process)[0]) as client,
    ):
        call = client.generate("abc", max_tokens=5)
        wait_for(lambda: client.load().num_running == 1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        call.cancel()
    assert process.returncode == 1
    assert "the device does not answer" in errors
    assert "Traceback" not in errors


@pytest.mark.long
def test_drain_timeout_cuts_short_with_exit_1(setup):
    ports = ("--grpc-port", "0", "--http-port", "0")
    with _process(setup, *ports, "--drain-timeout-s", "0") as process:
        with Client(_addresses(process)[0]) as client:
            deltas = iter(client.generate("abc", max_tokens=500, ignore_eos=True))
            next(deltas)
            process.send_signal(signal.SIGINT)
            with pytest.raises(NotAccepting, match="send the request elsewhere"):
                list(deltas)
        assert process.wait(timeout=20) == 1


@pytest.mark.long
def test_bad_model_is_one_line(setup, tmp_path):
    with _process(replace(setup, model=tmp_path / "nothing")) as process:
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "Traceback" not in errors
    assert "error: " in errors


@pytest.mark.long
def test_a_run_is_watched_and_streams_finish_on_their_version(setup: Setup, tmp_path: Path) -> None:
    """A newer checkpoint is served from when it is whole; a damaged one never is."""
    run = tmp_path / "run"
    source = open_model(setup.model)
    write_model_folder(run, source.config, source.load_tokenizer())
    _save_checkpoint(run, source, 1, 1.0)
    flags = ("--watch", str(run), "--watch-interval-s", "0.1", "--grpc-port", "0")
    with _process(replace(setup, model=run), *flags, "--http-port", "0") as process:
        grpc, _ = _addresses(process)
        with Client(grpc) as client:
            old = _answer(client)
            stream = client.generate("Once", max_tokens=400, temperature=0.0, ignore_eos=True)
            pieces = iter(stream)
            text = next(pieces).text
            _save_checkpoint(run, source, 2, -3.0)
            text += "".join(delta.text for delta in pieces)
            assert text.startswith(old)
            wait_for(lambda: client.model_info().weights == "run@2", 30)
            new = _answer(client)
            assert new != old
            _save_checkpoint(run, source, 3, float("nan"))
            time.sleep(1.0)
            assert _answer(client) == new
            assert client.model_info().weights == "run@2"
            assert client.load().num_compiles_after_ready == 0
        process.send_signal(signal.SIGTERM)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0
    assert "serving run@2" in log
    assert "run@3 is not served: its weights hold NaN" in log.replace("\n", " ")


def _answer(client: Client) -> str:
    return "".join(
        delta.text
        for delta in client.generate("Once", max_tokens=40, temperature=0.0, ignore_eos=True)
    )


def _save_checkpoint(run: Path, source: ModelSource, step: int, scale: float) -> None:
    params = source.load_params("float32")
    changed = {
        name: leaf * scale if "mlp" in name else leaf for name, leaf in flatten(params).items()
    }
    with Store(run / CHECKPOINTS) as store:
        store.save(step, {"params": unflatten(changed)}).wait()
