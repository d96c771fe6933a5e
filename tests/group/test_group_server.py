"""Several processes serve one model: real processes, signals and clients."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from jaxserve.client import Client
from jaxserve.distributed import free_port
from jaxserve.engine.group.follower import EXIT_LEADER_LOST
from jaxserve.engine.request import FinishReason
from jaxserve.errors import NotAccepting
from tests.group.processes import GREEDY, PROGRAM, ServerProcess, outputs, serve, wait_for_end
from tests.server.scripted_service import wait_for
from tests.server.tiny_model import write_tiny_model

PAIR = ("--processes", 2, "--mesh", "tensor=2")
ALONE = ("--token-budget", 16, "--buckets", "4,16")
"""Programs that other tests compile, too."""
PROMPTS = {"hello": 40, "The quick brown fox jumps over the lazy dog": 30, "x": 60}
HANG_S = 60.0
"""No client may wait longer than this for anything in these tests."""


@dataclass(frozen=True)
class Setup:
    model: Path
    cache: Path
    folder: Path


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path) -> Setup:
    folder = tmp_path_factory.mktemp("group")
    return Setup(write_tiny_model(folder / "tiny"), compilation_cache, folder)


@pytest.fixture
def pair(setup: Setup, tmp_path: Path) -> Iterator[ServerProcess]:
    flags = (*PAIR, "--follower-timeout-s", 2)
    with serve(setup.model, setup.cache, tmp_path / "log", *flags) as server:
        yield server


def _answers(address: str) -> dict[str, tuple[list[int], list[float]]]:
    with Client(address) as client:
        answers = {prompt: outputs(client, prompt, count) for prompt, count in PROMPTS.items()}
        constraint = {"regex": "([a-f]{3} ){4}[0-9]"}
        held = list(client.generate("Held", temperature=0, max_tokens=40, constraint=constraint))
        assert re.fullmatch(constraint["regex"], "".join(output.text for output in held))
        return answers


def _lose(server: ServerProcess, pid: int, number: signal.Signals) -> str:
    """Sends the signal to a follower under four streams; what all of them ended with."""
    errors: list[Exception] = []

    def read(index: int) -> None:
        with Client(server.grpc) as client:
            try:
                for _ in client.generate(f"{index}", max_tokens=500, timeout_s=HANG_S, **GREEDY):
                    pass
            except Exception as error:
                errors.append(error)

    readers = [threading.Thread(target=read, args=(index,)) for index in range(4)]
    with Client(server.grpc) as client:
        for reader in readers:
            reader.start()
        wait_for(lambda: client.load().num_running == 4, HANG_S)
        os.kill(pid, number)
        for reader in readers:
            reader.join()
        assert [type(error) for error in errors] == [NotAccepting] * 4, "UNAVAILABLE, each"
        _check_refusal(server, client, str(errors[0]))
    assert len({str(error) for error in errors}) == 1
    return str(errors[0])


def _check_refusal(server: ServerProcess, client: Client, why: str) -> None:
    """A server that has lost a process says so to everybody, then ends."""
    assert not client.is_serving()
    with pytest.raises(NotAccepting) as refusal:
        list(client.generate("x", max_tokens=1))
    assert str(refusal.value) == why
    with pytest.raises(urllib.error.HTTPError) as health:
        urllib.request.urlopen(f"http://{server.http}/health", timeout=5)
    assert (health.value.code, health.value.read()) == (503, b"degraded\n")


def _check_end(server: ServerProcess, why: str) -> None:
    followers = server.children
    assert server.process.wait(HANG_S) == 1
    assert f"error: {why}" in server.log.read_text()
    for pid in followers:
        wait_for_end(pid, HANG_S)


def test_two_processes_answer_as_one_device_and_a_killed_follower_is_named(
    setup: Setup, pair: ServerProcess
) -> None:
    with serve(setup.model, setup.cache, setup.folder / "alone", *ALONE) as alone:
        expected = _answers(alone.grpc)
    answers = _answers(pair.grpc)
    assert {p: ids for p, (ids, _) in answers.items()} == {
        p: ids for p, (ids, _) in expected.items()
    }
    with Client(pair.grpc) as client:
        assert client.load().num_compiles_after_ready == 0
    (follower,) = pair.children
    why = _lose(pair, follower, signal.SIGKILL)
    assert why.startswith("process 1 (")
    assert f"pid {follower}) was ended by SIGKILL" in why
    _check_end(pair, why)


@pytest.mark.long
def test_a_stopped_follower_is_named_within_the_limit(pair: ServerProcess) -> None:
    (follower,) = pair.children
    start_s = time.monotonic()
    why = _lose(pair, follower, signal.SIGSTOP)
    assert time.monotonic() - start_s < HANG_S / 2
    assert f"pid {follower}) has given no sign of life for 2 s" in why
    _check_end(pair, why)


@pytest.mark.long
def test_an_idle_server_notices_too(pair: ServerProcess) -> None:
    (follower,) = pair.children
    with Client(pair.grpc) as client:
        assert client.is_serving()
        os.kill(follower, signal.SIGSTOP)
        wait_for(lambda: not client.is_serving(), HANG_S)
        with pytest.raises(NotAccepting) as refusal:
            list(client.generate("x", max_tokens=1))
        _check_refusal(pair, client, str(refusal.value))
    _check_end(pair, str(refusal.value))


@pytest.mark.long
def test_followers_end_with_a_killed_leader(pair: ServerProcess) -> None:
    (follower,) = pair.children
    with Client(pair.grpc) as client:
        stream = iter(client.generate("x", max_tokens=500, timeout_s=HANG_S, **GREEDY))
        next(stream)
        pair.process.kill()
        with pytest.raises(NotAccepting):
            list(stream)
    wait_for_end(follower, HANG_S)


@pytest.mark.long
def test_a_group_drains_and_ends_in_good_order(pair: ServerProcess) -> None:
    """SIGTERM reaches all of a service's processes: followers go on until the leader is done."""
    (follower,) = pair.children
    with Client(pair.grpc) as client:
        stream = iter(client.generate("x", max_tokens=300, timeout_s=HANG_S, **GREEDY))
        next(stream)
        os.kill(follower, signal.SIGTERM)
        pair.process.send_signal(signal.SIGTERM)
        last = list(stream)[-1]
    assert last.finish_reason is FinishReason.LENGTH
    assert pair.process.wait(HANG_S) == 0
    wait_for_end(follower, HANG_S)
    assert "error" not in pair.log.read_text()


@pytest.fixture
def host_flags(tmp_path: Path) -> tuple[object, ...]:
    """What each process is told when they are started one by one, as on several hosts."""
    token = tmp_path / "token"
    token.write_text("a secret for this test alone")
    token.chmod(0o600)
    address = f"127.0.0.1:{free_port()}"
    return ("--coordinator", address, "--num-processes", 2, "--group-token-file", token)


def _follower(setup: Setup, log: Path, *flags: object) -> subprocess.Popen[str]:
    command = [*PROGRAM, "--compilation-cache-dir", setup.cache, "--process-id", 1, *flags]
    with log.open("w") as file:
        return subprocess.Popen(list(map(str, command)), stderr=file, text=True)


@pytest.mark.long
def test_processes_of_several_hosts_find_each_other_and_end_with_a_stopped_leader(
    setup: Setup, tmp_path: Path, host_flags: tuple[object, ...]
) -> None:
    timeout = ("--follower-timeout-s", 2)
    follower = _follower(setup, tmp_path / "1", "--model", setup.model, *host_flags, *timeout)
    mesh = ("--mesh", "tensor=2", "--process-id", 0)
    log = tmp_path / "0"
    try:
        with serve(setup.model, setup.cache, log, *host_flags, *timeout, *mesh) as leader:
            with Client(leader.grpc) as client:
                assert len(outputs(client, "hello", 10)[0]) == 10
            leader.process.send_signal(signal.SIGSTOP)
            assert follower.wait(HANG_S) == EXIT_LEADER_LOST
            assert "the leader has given no sign of life for 2 s" in (tmp_path / "1").read_text()
    finally:
        follower.kill()
        follower.wait()


@pytest.mark.long
def test_a_follower_that_cannot_start_is_named_with_its_reason(
    setup: Setup, tmp_path: Path, host_flags: tuple[object, ...]
) -> None:
    missing = tmp_path / "missing"
    follower = _follower(setup, tmp_path / "1", "--model", missing, *host_flags)
    command = [*PROGRAM, "--model", setup.model, "--mesh", "tensor=2", "--process-id", 0]
    command += [*host_flags, "--grpc-port", 0, "--http-port", 0, "--max-model-len", 64]
    try:
        result = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=HANG_S
        )
        assert follower.wait(HANG_S) in (2, EXIT_LEADER_LOST)
    finally:
        follower.kill()
        follower.wait()
    assert result.returncode in (1, 2)
    (error,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: process 1 (")
    assert "failed: " in error
    assert str(missing) in error


@pytest.mark.long
def test_four_processes_give_the_bits_of_four_devices(setup: Setup) -> None:
    folder = setup.folder
    mesh = ("--mesh", "stage=2,tensor=2")
    with serve(setup.model, setup.cache, folder / "one", *mesh, "--virtual-devices", 4) as one:
        expected = _answers(one.grpc)
    with serve(setup.model, setup.cache, folder / "four", *mesh, "--processes", 4) as four:
        assert _answers(four.grpc) == expected
        with Client(four.grpc) as client:
            assert client.load().num_compiles_after_ready == 0
        os.kill(four.children[2], signal.SIGKILL)
        with Client(four.grpc) as client:
            wait_for(lambda: not client.is_serving(), HANG_S)
        assert four.process.wait(HANG_S) == 1
        assert "process 3 (" in (folder / "four").read_text()
