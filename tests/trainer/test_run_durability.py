"""Checkpoints of a run: damage, full disks, two writers, moves. With toy trainers."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.trainer.errors import RunError
from tests.trainer.conftest import MakeRun
from tests.trainer.independent_reader import committed, kinds, last_checkpoint
from tests.trainer.run_driver import Run, is_alive, send, wait_for_death
from tests.trainer.test_supervisor import EXIT_PREEMPTED, assert_same, slow


def stop_at(run: Run, step: int, processes: int = 2) -> None:
    """Trains until `step` is committed, then drains."""
    slow(run)

    def meddle() -> None:
        run.wait_for_step(step)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run.train_here(processes, meddle=meddle) == EXIT_PREEMPTED
    slow(run, 0.0)


def damage(run: Run, step: int) -> Path:
    """Flips one bit of the array data of a checkpoint."""
    files = [path for path in (run.path / "checkpoints" / "steps" / f"{step:012d}").rglob("*")
             if path.is_file() and "arrays" in path.parts]  # fmt: skip
    path = max(files, key=lambda file: file.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 8
    path.write_bytes(data)
    return path


def test_damaged_checkpoint_is_quarantined_and_the_last_good_one_used(
    make_run: MakeRun, toy_reference: Run
) -> None:
    run = make_run()
    stop_at(run, 22)
    newest = last_checkpoint(run.path)
    damage(run, newest)
    assert run.train_here(1) == 0
    records = assert_same(run, toy_reference)
    fallback = next(record for record in records if record["kind"] == "ckpt_fallback")
    assert (fallback["skipped_step"], fallback["to_step"]) == (newest, 20)
    assert "arrays/" in fallback["problems"][0]
    assert "its bytes are not those written" in fallback["problems"][0]
    assert next(r for r in records if r["kind"] == "rollback")["to_step"] == 20
    assert list((run.path / "checkpoints" / "quarantine").glob(f"{newest:012d}*"))


def test_no_good_checkpoint_needs_a_decision(make_run: MakeRun, toy_reference: Run) -> None:
    run = make_run()
    stop_at(run, 3)
    damage(run, last_checkpoint(run.path))
    with pytest.raises(RunError, match=r"no checkpoint is whole.*--allow-restart-from-scratch"):
        run.train_here(1)
    assert committed(run.checked()), "the refusal took steps back"
    with pytest.raises(RunError, match="--allow-restart-from-scratch"):
        run.train_here(1)
    assert run.train_here(1, restart_from_scratch=True) == 0
    records = assert_same(run, toy_reference)
    assert kinds(records)["restart_from_scratch"] == 1


@pytest.mark.long
@pytest.mark.parametrize("num_errors", [1, 100])
def test_all_ranks_restore_the_same_step_when_a_read_fails(
    make_run: MakeRun, toy_reference: Run, monkeypatch: pytest.MonkeyPatch, num_errors: int
) -> None:
    run = make_run()
    stop_at(run, 22)
    newest = last_checkpoint(run.path)
    manifest = run.path / "checkpoints" / "steps" / f"{newest:012d}" / "manifest.json"
    read_bytes, failed = Path.read_bytes, []

    def flaky(path: Path) -> bytes:
        if path == manifest and len(failed) < num_errors:
            failed.append(path)
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", flaky)
    assert run.train_here(3) == 0
    records = assert_same(run, toy_reference)
    assert failed
    begun = [record["from_step"] for record in records if record["kind"] == "generation"]
    expected = newest if num_errors == 1 else 20  # An error that stays counts as damage.
    assert begun == [0, expected]
    assert kinds(records)["ckpt_fallback"] == (num_errors > 1)
    ids = IndexSampler(90, 0).ids_of(expected * 16, 16).tolist()
    first_read = []
    for rank in range(3):
        log = run.path / "logs" / f"reads-g0002-r{rank}.jsonl"
        first_read += json.loads(log.read_text().splitlines()[0])["ids"]
    assert first_read == ids


@pytest.mark.long
def test_changed_ledger_is_refused(make_run: MakeRun) -> None:
    run = make_run()
    stop_at(run, 3)
    ledger = run.path / "ledger.jsonl"
    text = ledger.read_text()
    ledger.write_text(text.replace('"step":1,', '"step":2,', 1))
    with pytest.raises(RunError, match="the chain of hashes is broken"):
        run.train_here(1)
    ledger.write_text(text + '{"kind":"step","st')
    assert run.train_here(1) == 0
    assert kinds(run.checked())["torn_tail"] == 1


def test_second_start_is_refused_at_once(make_run: MakeRun, toy_reference: Run) -> None:
    run = make_run()
    slow(run, 1.0)
    other = Run(run.path, run.config)

    def meddle() -> None:
        run.wait_for_step(0)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        other.start(1)
        code, said = other.finish()
        slow(run, 0.0)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # Processor time: what it takes does not depend on what else the machine does.
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5
        assert code == 2
        assert "the run is being trained already" in said
        assert "jaxserve train stop" in said

    assert run.train_here(1, meddle=meddle) == 0
    assert {r["epoch"] for r in assert_same(run, toy_reference)} == {1}


def test_stopped_writer_that_wakes_up_changes_nothing(
    make_run: MakeRun, toy_reference: Run
) -> None:
    run = make_run()
    slow(run, 0.1)
    first = run.start(2)
    run.wait_for_step(3)
    trainers = run.trainer_pids()
    send(first.pid, signal.SIGSTOP)
    slow(run, 0.0)
    assert Run(run.path, run.config).train_here(1, take_over=True) == 0
    # Its heartbeat is a file of its own epoch, which nobody reads any more.
    before = {
        path: path.read_bytes()
        for path in run.path.rglob("*")
        if path.is_file() and "logs" not in path.parts and path.suffix != ".heartbeat"
    }
    assert is_alive(first.pid), "the first writer was to be stopped, not dead"
    send(first.pid, signal.SIGCONT)
    code, said = run.finish()
    assert code == 2
    assert "epoch" in said
    assert "fenced" in said
    wait_for_death(trainers)
    for path, content in before.items():
        assert path.read_bytes() == content, path
    records = assert_same(run, toy_reference)
    assert [r["epoch"] for r in records] == sorted(r["epoch"] for r in records)
    starts = {r["epoch"]: r["pid"] for r in records if r["kind"] == "start"}
    assert starts == {1: first.pid, 2: os.getpid()}


@pytest.mark.long
def test_run_moves_to_another_place(
    make_run: MakeRun, toy_reference: Run, tiny_data: Path, tmp_path: Path
) -> None:
    run = make_run()
    stop_at(run, 7)
    moved = make_run("elsewhere")
    run.path.rename(moved.path)
    data = tmp_path / "data elsewhere"
    shutil.copytree(tiny_data, data)
    assert moved.train_here(3, f'data.path="{data}"') == 0
    assert_same(moved, toy_reference)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 KiB; needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "none", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


# Orbax closes its event loop at the first failed write; callbacks of others then have none.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. None:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.root
@pytest.mark.long
@pytest.mark.parametrize("policy", ["continue", "stop"])
def test_full_disk_is_seen_at_once(
    make_run: MakeRun, toy_reference: Run, small_disk: Path, policy: str
) -> None:
    run = make_run()
    slow(run, 0.05)
    (run.path / "checkpoints").symlink_to(small_disk)
    filler = small_disk / "filler"

    def meddle() -> None:
        run.wait_for(lambda records: kinds(records)["checkpoint"] == 1)
        filled = subprocess.run(["dd", "if=/dev/zero", f"of={filler}"], capture_output=True)
        assert b"No space left" in filled.stderr
        records = run.wait_for(lambda records: kinds(records)["checkpoint_failed"] == 1)
        failed = next(r for r in records if r["kind"] == "checkpoint_failed")
        newest = max(r["step"] for r in records if r["kind"] == "step")
        assert failed["next_step"] == 20
        assert newest < 30, "the error came only with the next save"
        assert not list((small_disk / "staging").iterdir())
        filler.unlink()

    setting = f"durability.on_save_failure={policy}"
    if policy == "stop":
        with pytest.raises(RunError, match=r"could not be saved .*Make room"):
            run.train_here(2, setting, meddle=meddle)
        assert run.train_here(2, setting) == 0
    else:
        assert run.train_here(2, setting, meddle=meddle) == 0
    records = assert_same(run, toy_reference)
    assert kinds(records)["checkpoint_failed"] == 1
    metrics = [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]
    assert any(line.get("ckpt_failures_total") == 1 for line in metrics)
