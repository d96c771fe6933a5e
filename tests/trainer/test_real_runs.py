"""`jaxserve train` as a black box with real trainers: JAX, Gloo, and the tiny model of these tests.

The command, its signals and its files are real; what is compared comes from an independent
reader. One compilation cache is shared by all.
"""

from __future__ import annotations

import os
import random
import signal
import time

import pytest

from tests.trainer.conftest import MakeRun
from tests.trainer.independent_reader import committed, kinds, last_checkpoint, reads
from tests.trainer.run_driver import Run, is_alive, send, wait_for_death
from tests.trainer.test_supervisor import EXIT_PREEMPTED, assert_same

TOTAL_STEPS = 160
"""Enough for faults to hit: a step takes 30 ms, and a test notices it some steps later."""
DROPOUT = "numerics.dropout=0.1"


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Run:
    """An uninterrupted run in one process on one device."""
    from tests.trainer.run_driver import CONFIG

    folder = tmp_path_factory.mktemp("real")
    data, cache = (request.getfixturevalue(name) for name in ("tiny_data", "compilation_cache"))
    config = folder / "run.toml"
    config.write_text(
        CONFIG.format(run=folder / "run", total_steps=TOTAL_STEPS, data=data, cache=cache)
    )
    run = Run(folder / "run", config, is_toy=False)
    run.train(1, DROPOUT)
    return run


def killed(run: Run, at_step: int, rank: int = 0) -> None:
    """Kills a trainer, whose PID dies, and then stops the run."""
    run.wait_for_step(at_step)
    pid = run.trainer_pids()[rank]
    send(pid, signal.SIGKILL)
    wait_for_death([pid])


def stopped(run: Run) -> None:
    """Drains a run; every trainer is gone afterwards."""
    pids = run.trainer_pids()
    run.kill(signal.SIGTERM)
    code, said = run.finish()
    assert code == EXIT_PREEMPTED, said
    assert not [pid for pid in pids if is_alive(pid)]
    assert last_checkpoint(run.path) == len(committed(run.checked()))


@pytest.mark.long
def test_kill_and_resume_on_other_processes(make_run: MakeRun, reference: Run) -> None:
    run = make_run(total_steps=TOTAL_STEPS, is_toy=False)
    run.start(2, DROPOUT)
    killed(run, 8, rank=1)
    run.wait_for(lambda records: kinds(records)["generation"] == 2)
    run.wait_for_step(14)
    stopped(run)
    run.train(1, DROPOUT, devices=3)
    records = assert_same(run, reference)
    assert kinds(records)["failure"] == 1
    assert kinds(records)["rollback"] == 0
    assert {step["device_count"] for step in committed(records)} == {2, 3}


@pytest.mark.long
def test_chain_of_virtual_devices(make_run: MakeRun, reference: Run) -> None:
    run = make_run(total_steps=TOTAL_STEPS, is_toy=False)
    for devices, end in ((8, "kill"), (4, "stop"), (2, "kill"), (5, "stop"), (7, "kill")):
        run.start(1, DROPOUT, devices=devices)
        done = len(committed(run.records()))
        run.wait_for_step(min(done + 5, TOTAL_STEPS - 2))
        if end == "kill":  # The whole host: memory is gone, and so are the steps since the save.
            pids = run.trainer_pids()
            run.kill(signal.SIGKILL)
            run.finish()
            wait_for_death(pids)
        else:
            stopped(run)
    run.train(1, DROPOUT, devices=8)
    records = assert_same(run, reference)
    assert {step["device_count"] for step in committed(records)} <= {8, 4, 2, 5, 7}
    assert {r["device_count"] for r in records if r["kind"] == "generation"} == {8, 4, 2, 5, 7}


@pytest.mark.long
def test_chain_of_processes(make_run: MakeRun, reference: Run) -> None:
    from jaxserve.cli.train import resize

    run = make_run(total_steps=TOTAL_STEPS, is_toy=False)
    run.start(1, DROPOUT)
    for processes in (4, 2, 3, 8):
        run.wait_for_step(len(committed(run.records())) + 4)
        resize(run.path, processes=processes, devices=1)
        run.wait_for(
            lambda records, n=processes: (
                records[-1].get("device_count") == n and records[-1]["kind"] == "step"
            ),
        )
    code, said = run.finish()
    assert code == 0, said
    records = assert_same(run, reference)
    assert kinds(records)["resize"] == 4
    assert kinds(records)["rollback"] == 0
    assert {step["device_count"] for step in committed(records)} == {1, 4, 2, 3, 8}


@pytest.mark.long
@pytest.mark.parametrize("phase", ["start", "compilation", "evaluation", "save", "twice"])
def test_sigterm_in_every_phase(make_run: MakeRun, reference: Run, phase: str) -> None:
    run = make_run(total_steps=TOTAL_STEPS, is_toy=False, extra="[evaluation]\nevery = 3\n")
    process = run.start(2, DROPOUT, "durability.checkpoint_every=2")
    if phase == "start":
        run.wait_for(lambda records: len(records) > 0)
    elif phase == "compilation":
        run.wait_for(lambda records: kinds(records)["generation"] == 1)
        time.sleep(2)
    elif phase == "evaluation":
        run.wait_for_step(2)
    else:
        run.wait_for_step(3)
    process.send_signal(signal.SIGTERM)
    if phase == "twice":
        time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
    begin_s = time.monotonic()
    code, said = run.finish()
    assert code == EXIT_PREEMPTED, said
    assert time.monotonic() - begin_s < 30
    run.train(1, DROPOUT)
    assert kinds(assert_same(run, reference))["rollback"] == 0


@pytest.mark.long
def test_grace_that_is_too_short(make_run: MakeRun, reference: Run) -> None:
    run = make_run(total_steps=TOTAL_STEPS, is_toy=False)
    process = run.start(2, DROPOUT, "durability.checkpoint_every=2")
    run.wait_for_step(6)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.02)
    process.kill()
    run.finish()
    wait_for_death(run.trainer_pids())
    run.train(2, DROPOUT)
    assert_same(run, reference)


@pytest.mark.long
def test_twenty_random_kills(make_run: MakeRun, reference: Run) -> None:
    seed = int.from_bytes(os.urandom(4), "big")
    print(f"seed {seed}")
    choice = random.Random(seed)
    run = make_run(total_steps=TOTAL_STEPS, is_toy=False)
    num_hit = 0
    for _ in range(20):
        run.start(choice.choice((1, 2, 3)), DROPOUT, "durability.checkpoint_every=3")
        assert run.process is not None
        records = run.records()
        generations, done = kinds(records)["generation"], len(committed(records))
        run.wait_for(lambda records, n=generations: kinds(records)["generation"] > n)
        if choice.random() < 0.5:  # While it starts, or soon after.
            time.sleep(choice.uniform(0, 4))
        else:
            run.wait_for_step(min(done + choice.randint(0, 8), TOTAL_STEPS - 1))
        victims = [pid for pid in run.trainer_pids() if is_alive(pid)]
        if choice.random() < 0.6 and victims:
            victim = choice.choice(victims)
            os.kill(victim, signal.SIGKILL)
            wait_for_death([victim])
            num_hit += 1
            time.sleep(choice.uniform(0, 3))
        pids = run.trainer_pids()
        if run.process.poll() is None:
            run.kill(signal.SIGKILL)
            num_hit += 1
        code, said = run.finish()
        wait_for_death(pids)
        if code != -signal.SIGKILL:
            assert code == 0, said
            break
    run.train(2, DROPOUT)
    records = assert_same(run, reference)
    assert num_hit >= 10
    assert kinds(records)["start"] > 5
    steps = committed(records)
    assert len({step["ids_sha256"] for step in steps}) == TOTAL_STEPS
    expected = {example for read in reads(reference.path) for example in read["ids"]}
    assert {example for read in reads(run.path) for example in read["ids"]} <= expected
