"""A preparation that is killed goes on where it stopped, to the same bytes, in bounded memory."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from jaxserve.trainer.data.errors import DataError
from jaxserve.trainer.data.prepare import prepare
from jaxserve.trainer.data.prepare_config import PrepareConfig
from tests.trainer.data.prepare_process import word_tokenizer
from tests.trainer.data.rig import files_of

ROOT = Path(__file__).parents[3]
COMMAND = [sys.executable, "-m", "tests.trainer.data.prepare_process"]


def write_words(path: Path, num_bytes: int, line_words: int = 40) -> Path:
    """JSONL of about `num_bytes`."""
    generator = np.random.default_rng(0)
    with path.open("w") as file:
        while file.tell() < num_bytes:
            numbers = generator.integers(0, 1000, line_words)
            file.write(json.dumps({"text": " ".join(f"word{n}" for n in numbers)}) + "\n")
    return path


def start(source: Path, out: Path, num_workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, str(source), str(out), str(num_workers)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(child) for child in text.split()]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition: object, timeout_s: float = 100.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def done_records(work: Path) -> int:
    try:
        position = json.loads((work / "journal.json").read_text())["position"]
    except FileNotFoundError:
        return 0
    return 10**9 if position["source"] else position["records"]


@pytest.fixture
def source(tmp_path: Path) -> Iterator[Path]:
    return write_words(tmp_path / "words.jsonl", 3 << 20)


def test_killed_at_random_moments_the_bytes_are_the_same(tmp_path: Path, source: Path) -> None:
    seed = 20261127
    chance = random.Random(seed)
    reference = tmp_path / "reference"
    assert start(source, reference, 1).wait(100) == 0
    out, work = tmp_path / "out", tmp_path / ".out.preparing"
    hits = []
    for workers in (1, 2, 1):
        process = start(source, out, workers)
        target = done_records(work) + chance.randint(512, 2500)
        wait_until(lambda p=process, t=target: done_records(work) >= t or p.poll() is not None)
        children = children_of(process.pid)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was over before the kill"
        assert children
        wait_until(lambda pids=children: not any(map(is_alive, pids)))
        hits.append(done_records(work))
        assert not out.exists()
        assert process.stdout is not None
        process.stdout.close()
    assert hits == sorted(hits), f"work was lost (seed {seed})"
    assert hits[0] > 0
    process = start(source, out, 2)
    assert process.wait(100) == 0
    assert files_of(out) == files_of(reference)
    assert not work.exists()


def test_other_options_do_not_go_on_with_unfinished_work(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "word1 word2"}\n{"text": 5}\n')
    out = tmp_path / "out"

    def run(seq_len: int, force: bool = False) -> None:
        config = PrepareConfig((source,), out, seq_len=seq_len, eval_fraction=0, force=force)
        prepare(config, word_tokenizer())

    with pytest.raises(DataError, match="line 2: text is needed"):
        run(64)
    with pytest.raises(DataError, match=r"another seq_len \(then 64, now 32\)"):
        run(32)
    with pytest.raises(DataError, match="line 2"):
        run(32, force=True)
    time.sleep(0.01)
    source.write_text('{"text": "word1 word2"}\n{"text": "word3"}\n')
    with pytest.raises(DataError, match="another sources"):
        run(32)
    run(32, force=True)
    assert out.is_dir()


def test_two_at_once_are_refused(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    process = start(source, out, 1)
    try:
        wait_until((tmp_path / ".out.preparing" / "journal.json").exists)
        os.kill(process.pid, signal.SIGSTOP)
        config = PrepareConfig((source,), out, seq_len=128, eval_fraction=0.1)
        with pytest.raises(DataError, match="another process prepares"):
            prepare(config, word_tokenizer())
    finally:
        process.kill()
        process.communicate()


def peak_memory(process: subprocess.Popen[str]) -> dict[str, int]:
    """Waits for `process`; the most memory, in bytes, that it and any child of it had."""
    peaks = {"itself": 0, "worker": 0}
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            peaks["itself"] = max(peaks["itself"], high_water_mark(process.pid))
            for child in children_of(process.pid):
                # Before its exec, a child is a copy of its parent.
                if b"encode_worker" in Path(f"/proc/{child}/cmdline").read_bytes():
                    peaks["worker"] = max(peaks["worker"], high_water_mark(child))
        time.sleep(0.02)
    return peaks


def high_water_mark(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


@pytest.mark.long
@pytest.mark.parametrize("suffix", ["jsonl", "txt"])
def test_memory_does_not_grow_with_the_source(tmp_path: Path, suffix: str) -> None:
    """Nine times the text, in many documents or one, costs less than half of the difference.

    The difference is large against what the allocator of a worker's threads keeps, a few MB
    that are one time there and another time not.
    """
    sizes = {"small": 3 << 20, "large": 27 << 20}
    peaks = {}
    for name, num_bytes in sizes.items():
        source = write_words(tmp_path / f"{name}.{suffix}", num_bytes)
        process = start(source, tmp_path / f"{name}-out", 2)
        peaks[name] = peak_memory(process)
        assert process.returncode == 0
        assert process.stdout is not None
        process.stdout.close()
    growth = {who: peaks["large"][who] - peaks["small"][who] for who in peaks["small"]}
    print(f"peaks {peaks}, growth {growth}")
    assert min(peaks["large"].values()) > 10 << 20
    assert max(growth.values()) < (sizes["large"] - sizes["small"]) / 2
