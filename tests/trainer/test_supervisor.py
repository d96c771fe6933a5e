"""The supervisor with toy trainers: real processes, signals, files and shared memory.

Every test asserts that its fault hit, and compares the result with an uninterrupted run.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxserve.trainer.data.sampler import IndexSampler
from jaxserve.trainer.errors import RunError, TrainingFailed
from tests.trainer.conftest import MakeRun
from tests.trainer.independent_reader import (
    checkpoint_arrays,
    committed,
    kinds,
    last_checkpoint,
    reads,
    results,
)
from tests.trainer.run_driver import Run, is_alive, send, wait_for_death
from tests.trainer.toy_trainer import POISON, STEP_SECONDS

EXIT_PREEMPTED = 75


def slow(run: Run, seconds: float = 0.02) -> None:
    """Gives faults time to hit."""
    (run.path / "logs").mkdir(parents=True, exist_ok=True)
    (run.path / "logs" / STEP_SECONDS).write_text(str(seconds))


def assert_same(run: Run, reference: Run) -> list[dict[str, Any]]:
    """The ledger's records, once steps and final arrays are the reference's to the bit."""
    records = run.checked()
    assert results(committed(records)) == results(committed(reference.checked()))
    last = last_checkpoint(reference.path)
    assert last_checkpoint(run.path) == last
    arrays, expected = checkpoint_arrays(run.path, last), checkpoint_arrays(reference.path, last)
    assert arrays.keys() == expected.keys()
    for name, array in expected.items():
        assert arrays[name].dtype == array.dtype
        assert arrays[name].shape == array.shape
        assert arrays[name].tobytes() == array.tobytes(), name
    return records


def kill_trainer(run: Run, at_step: int, rank: int, number: int) -> Callable[[], None]:
    """What signals one trainer once `at_step` is committed."""

    def meddle() -> None:
        run.wait_for_step(at_step)
        pid = run.trainer_pids()[rank]
        send(pid, number)
        if number == signal.SIGKILL:
            wait_for_death([pid])

    return meddle


def test_reference_is_whole(toy_reference: Run) -> None:
    records = toy_reference.checked()
    steps = committed(records)
    assert len(steps) == 40
    assert {step["device_count"] for step in steps} == {1}
    assert kinds(records)["done"] == 1
    assert kinds(records)["checkpoint"] == 4
    assert steps[5]["first_index"] == 80
    assert steps[5]["last_index"] == 95  # The epoch's end, 90, lies inside.
    required = "step generation epoch device_count pids loss_hex grad_norm_hex lr_hex"
    required += " first_index last_index ids_sha256 prev_sha256"
    assert set(required.split()) <= steps[0].keys()


@pytest.mark.parametrize("rank", [0, pytest.param(2, marks=pytest.mark.long)])
def test_killed_trainer_costs_no_committed_step(
    make_run: MakeRun, toy_reference: Run, rank: int
) -> None:
    run = make_run()
    slow(run)
    assert run.train_here(3, meddle=kill_trainer(run, 8, rank, signal.SIGKILL)) == 0
    records = assert_same(run, toy_reference)
    assert kinds(records)["generation"] == 2
    assert kinds(records)["rollback"] == 0
    failure = next(record for record in records if record["kind"] == "failure")
    assert f"trainer {rank} was ended by SIGKILL" in failure["detail"]
    first, second = (r["pids"] for r in records if r["kind"] == "generation")
    assert not set(first) & set(second)


@pytest.mark.parametrize("whom", [pytest.param("supervisor", marks=pytest.mark.long), "trainer"])
def test_sigterm_drains_without_losing_a_step(
    make_run: MakeRun, toy_reference: Run, whom: str
) -> None:
    run = make_run()
    slow(run)

    def meddle() -> None:
        run.wait_for_step(11)
        send(os.getpid() if whom == "supervisor" else run.trainer_pids()[1], signal.SIGTERM)

    assert run.train_here(3, meddle=meddle) == EXIT_PREEMPTED
    records = run.checked()
    stop = records[-1]
    assert stop["kind"] == "stop"
    assert stop["next_step"] == last_checkpoint(run.path) == len(committed(records)) < 40
    assert not [pid for pid in run.trainer_pids() if is_alive(pid)]
    assert run.train_here(2) == 0
    records = assert_same(run, toy_reference)
    assert kinds(records)["rollback"] == 0
    assert {step["device_count"] for step in committed(records)} == {2, 3}


def test_killed_supervisor_takes_its_trainers_along(make_run: MakeRun, toy_reference: Run) -> None:
    run = make_run()
    slow(run, 0.05)
    process = run.start(2)
    run.wait_for(lambda records: kinds(records)["checkpoint"] == 1)
    run.wait_for_step(13)
    pids = run.trainer_pids()
    process.kill()
    process.wait()
    wait_for_death(pids)
    before = run.path.joinpath("ledger.jsonl").read_bytes()
    assert run.train_here(1) == 0
    records = assert_same(run, toy_reference)
    rollback = next(record for record in records if record["kind"] == "rollback")
    assert rollback["to_step"] == 10
    assert rollback["from_step"] >= 14
    assert rollback["generation"] == 2
    assert run.path.joinpath("ledger.jsonl").read_bytes().startswith(before.rpartition(b"\n")[0])
    metrics = (run.path / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in metrics if '"loss"' in line]) == 40


def test_stuck_trainer_is_named_and_replaced(make_run: MakeRun, toy_reference: Run) -> None:
    run = make_run()
    slow(run)
    code = run.train_here(
        3, "supervision.watchdog_s=1.0", meddle=kill_trainer(run, 6, 1, signal.SIGSTOP)
    )
    assert code == 0
    records = assert_same(run, toy_reference)
    stuck = next(record for record in records if record["kind"] == "stuck")
    assert stuck["ranks"] == [1]
    assert 1.0 <= stuck["silence_s"] < 5
    for rank in range(3):
        log = (run.path / "logs" / f"generation-0001-rank-{rank}.log").read_text()
        assert "Fatal Python error: Aborted" in log
        assert "worker.py" in log


@pytest.mark.long
def test_ids_are_read_exactly_once(make_run: MakeRun, toy_reference: Run) -> None:
    run = make_run()
    slow(run)
    assert run.train_here(2, meddle=kill_trainer(run, 10, 1, signal.SIGKILL)) == 0
    assert_same(run, toy_reference)
    first_epoch = [step["ids_sha256"] for step in committed(run.checked())]
    assert len(set(first_epoch)) == 40
    expected = sorted(example for read in reads(toy_reference.path) for example in read["ids"])
    assert sorted(set(expected)) == list(range(90))
    # What was read again for a step that was lost are the same examples.
    again = sorted(example for read in reads(run.path) for example in read["ids"])
    assert set(again) == set(expected)
    assert 0 <= len(again) - len(expected) <= 3 * 16


def test_resize_loses_no_step(make_run: MakeRun, toy_reference: Run) -> None:
    from jaxserve.cli.train import resize

    run = make_run()
    slow(run)

    def meddle() -> None:
        run.wait_for_step(5)
        resize(run.path, processes=4, devices=1)
        run.wait_for(lambda records: any(r.get("device_count") == 4 for r in records))
        run.wait_for_step(20)
        resize(run.path, processes=1, devices=3)

    assert run.train_here(2, meddle=meddle) == 0
    records = assert_same(run, toy_reference)
    assert kinds(records)["resize"] == 2
    assert kinds(records)["rollback"] == kinds(records)["failure"] == 0
    counts = [step["device_count"] for step in committed(records)]
    assert sorted(set(counts)) == [2, 3, 4]
    assert counts == sorted(counts, key=[2, 4, 3].index)


def test_poisoned_example_is_quarantined(make_run: MakeRun) -> None:
    run, again = make_run(total_steps=20), make_run("again", total_steps=20)
    bad = int(IndexSampler(90, 0).ids_of(3 * 16 + 5, 1)[0])
    for one, processes in ((run, 2), (again, 3)):
        slow(one, 0.0)
        (one.path / "logs" / POISON).write_text(str(bad))
        assert one.train_here(processes) == 0
    records = run.checked()
    spike = next(record for record in records if record["kind"] == "spike")
    assert spike["quarantined_ids"] == [bad]
    # The toy asks to go back one more step than needed: that one is taken back and done again.
    rollback = next(record for record in records if record["kind"] == "rollback")
    assert (rollback["to_step"], rollback["from_step"]) == (2, 3)
    assert len(committed(records)) == 20
    assert results(committed(again.checked())) == results(committed(records))


@pytest.mark.long
def test_trainers_that_always_fail_end_the_run(make_run: MakeRun) -> None:
    run = make_run()
    slow(run, 0.0)
    (run.path / "logs" / STEP_SECONDS).write_text("soon")
    begin_s = time.monotonic()
    with pytest.raises(TrainingFailed, match=r"3 generations in a row .*could not convert"):
        run.train_here(2, "supervision.max_failures=3")
    assert time.monotonic() - begin_s < 30
    assert kinds(run.checked())["failure"] == 3


def test_finished_run_stays_finished(toy_reference: Run) -> None:
    before = checkpoint_arrays(toy_reference.path, 40)
    assert toy_reference.train_here(2) == 0
    assert kinds(toy_reference.checked())["generation"] == 1
    np.testing.assert_equal(checkpoint_arrays(toy_reference.path, 40), before)


def test_other_world_is_refused_by_name(make_run: MakeRun, toy_reference: Run) -> None:
    for setting, field in (
        ("batch.global_batch_size=32", "batch.global_batch_size: the run has 16, this config 32"),
        ("optimizer.b1=0.5", "optimizer.b1: the run has None, this config 0.5"),
        ("total_steps=50", "total_steps: the run has 40"),
        ("data.seed=1", "data.seed: the run has 0"),
    ):
        with pytest.raises(RunError, match=field):
            toy_reference.train_here(1, setting)


@pytest.mark.long
def test_other_numerics_are_refused_or_recorded(make_run: MakeRun, toy_reference: Run) -> None:
    run = make_run()
    slow(run)

    def stop() -> None:
        run.wait_for_step(3)
        os.kill(os.getpid(), signal.SIGTERM)

    assert run.train_here(1, meddle=stop) == EXIT_PREEMPTED
    world = run.path / "world.json"
    world.write_text(world.read_text().replace('"machine":"toy"', '"machine":"other"'))
    with pytest.raises(RunError, match=r"machine: the run had 'other', now 'toy'"):
        run.train_here(1)
    assert run.train_here(1, numerics_change=True) == 0
    change = next(r for r in assert_same(run, toy_reference) if r["kind"] == "numerics_change")
    assert change["changes"] == [["machine", "other", "toy"]]


@pytest.mark.long
def test_goodput_matches_the_ledger(make_run: MakeRun) -> None:
    run = make_run()
    slow(run, 0.03)
    assert run.train_here(2, meddle=kill_trainer(run, 8, 1, signal.SIGKILL)) == 0
    records = run.checked()
    goodput = records[-1]["goodput"]
    categories = {name: value for name, value in goodput.items() if name.endswith("_s")}
    wall_s = categories.pop("wall_s")
    assert sum(categories.values()) == pytest.approx(wall_s, rel=0.01)
    begin_s = next(r["time_s"] for r in records if r["kind"] == "start")
    assert wall_s == pytest.approx(records[-1]["time_s"] - begin_s, rel=0.01, abs=1.0)
    # The same from the ledger's time stamps alone.
    failure = next(index for index, r in enumerate(records) if r["kind"] == "failure")
    after = next(r["time_s"] for r in records[failure:] if r["kind"] == "step")
    last = [r["time_s"] for r in records[:failure] if r["kind"] == "step"][-1]
    down_s = categories["restart_s"] + categories["lost_work_s"]
    assert down_s == pytest.approx(after - last, abs=0.3)
    steps = [r["time_s"] for r in records if r["kind"] == "step"]
    assert categories["step_s"] == pytest.approx(steps[-1] - steps[0] - (after - last), abs=0.4)


def test_run_dir_of_somebody_else_is_left_alone(make_run: MakeRun) -> None:
    run = make_run()
    run.path.mkdir()
    (run.path / "thesis.tex").write_text("precious")
    with pytest.raises(RunError, match=r"holds other files \(thesis.tex\) and no run"):
        run.train_here(1)
    assert run.train_here(1, "total_steps=5", force=True) == 0
    assert (Path(f"{run.path}.replaced-1") / "thesis.tex").read_text() == "precious"
