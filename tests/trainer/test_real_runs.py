"""`jaxserve train` as a black box with real trainers: JAX, Gloo, and the tiny model of these tests.

The command, its signals and its files are real; what is compared comes from an independent
reader. One compilation cache is shared by all.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import threading
import time

import pytest

from tests.trainer.conftest import MakeRun
from tests.trainer.independent_reader import committed, kinds, last_checkpoint, reads
from tests.trainer.run_driver import Run, is_alive, send, wait_for_death
from tests.trainer.test_supervisor import EXIT_PREEMPTED, assert_same

TOTAL_STEPS = 160
"""Enough for faults to hit: a step takes 30 ms, and a test notices it some steps later."""
NUM_KILLS = 20
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
    counts = [record["device_count"] for record in records if record["kind"] == "generation"]
    assert counts == [8, 4, 2, 5, 7, 8]
    assert {step["device_count"] for step in committed(records)} <= {*counts}


@pytest.mark.long
def test_chain_of_processes(make_run: MakeRun, reference: Run) -> None:
    from jaxserve.cli.train import resize

    run = make_run(total_steps=TOTAL_STEPS, is_toy=False)
    run.start(1, DROPOUT)
    for processes in (4, 2, 3, 8):
        run.wait_for_step(len(committed(run.records())) + 4)
        if processes == 3:
            killed(run, len(committed(run.records())), rank=1)
            run.wait_for(lambda records: kinds(records)["generation"] == 4)
            run.wait_for(lambda records: records[-1]["kind"] == "step")
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
    assert kinds(records)["failure"] == 1
    assert kinds(records)["rollback"] == 0
    assert {step["device_count"] for step in committed(records)} == {1, 4, 2, 3, 8}


class Slowed:
    """Lets a process run for a sixth of the time only: in pieces that are long beside what a busy
    machine adds to a sleep."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._meddle)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _meddle(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            while not self._is_over.is_set():
                os.kill(self._pid, signal.SIGSTOP)
                time.sleep(0.04)
                os.kill(self._pid, signal.SIGCONT)
                time.sleep(0.008)


@pytest.mark.long
def test_stopped_and_slow_trainers(make_run: MakeRun, reference: Run) -> None:
    run = make_run(total_steps=TOTAL_STEPS, is_toy=False)
    run.start(2, DROPOUT, "supervision.watchdog_s=2.0", "supervision.rebalance_after_s=0.6")
    run.wait_for_step(6)
    send(run.trainer_pids()[1], signal.SIGSTOP)
    records = run.wait_for(lambda records: kinds(records)["generation"] == 2)
    stuck = next(record for record in records if record["kind"] == "stuck")
    assert stuck["ranks"] == [1]
    assert stuck["trainers"][0]["phase"] == "exchanging"
    run.wait_for(lambda records: records[-1]["kind"] == "step")
    with Slowed(run.trainer_pids()[1]):
        records = run.wait_for(lambda records: kinds(records)["generation"] == 3)
    rebalance = next(record for record in records if record["kind"] == "rebalance")
    assert rebalance["speeds"][0] > 2 * rebalance["speeds"][1]
    run.wait_for(lambda records: records[-1]["kind"] == "step")
    with Slowed(run.trainer_pids()[1]):
        run.wait_for_step(rebalance["next_step"] + 20)
    code, said = run.finish()
    assert code == 0, said
    records = assert_same(run, reference)
    assert kinds(records)["rollback"] == 0
    # How much faster the steps get is not asked here: that needs cores of their own.


@pytest.mark.long
def test_sigterm_in_every_phase(make_run: MakeRun, reference: Run) -> None:
    run = make_run(total_steps=TOTAL_STEPS, is_toy=False, extra="[evaluation]\nevery = 3\n")
    for number, phase in enumerate(("start", "compilation", "evaluation", "save", "twice")):
        process = run.start(2, DROPOUT, "durability.checkpoint_every=2")
        starts, done = number + 1, len(committed(run.records()))
        if phase == "start":
            run.wait_for(lambda records, n=starts: kinds(records)["start"] == n)
        elif phase == "compilation":
            run.wait_for(lambda records: kinds(records)["generation"] == 1)
            time.sleep(2)
        elif phase == "evaluation":
            run.wait_for_step(done + 3 - done % 3 - 1)
        else:  # Every other step is saved, so that a save is under way most of the time.
            run.wait_for_step(done + 3)
        process.send_signal(signal.SIGTERM)
        if phase == "twice":
            time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
        begin_s = time.monotonic()
        code, said = run.finish()
        assert code == EXIT_PREEMPTED, (phase, said)
        assert time.monotonic() - begin_s < 30
        assert kinds(run.checked())["stop"] == starts
    run.train(1, DROPOUT)
    assert kinds(assert_same(run, reference))["rollback"] == 0


@pytest.mark.long
def test_killed_while_the_rate_tunes_itself(make_run: MakeRun) -> None:
    """From a checkpoint and from a snapshot inside the ramp: the same rates, the same bits."""
    tuned = 'kind = "auto"\ninitial_lr = 1e-4\nprobe_every = 8\nnum_batches = 2\n'
    tuned += "min_ramp_fraction = 0.8\nmax_ramp_fraction = 0.9\n"
    runs = [make_run(name, total_steps=80, is_toy=False) for name in ("whole", "killed")]
    for run in runs:
        text = run.config.read_text()
        replaced = re.sub(r'kind = "cosine".*?(?=\[durability\])', tuned, text, flags=re.S)
        assert replaced != text
        run.config.write_text(replaced)
    whole, run = runs
    said = whole.train(1, DROPOUT, "logging.plot=true")
    assert "probes of the learning rate: " in said
    assert (whole.path / "plot.png").read_bytes().startswith(b"\x89PNG")
    run.start(2, DROPOUT, "durability.checkpoint_every=4")
    run.wait_for_step(9)
    pids = run.trainer_pids()
    run.kill(signal.SIGKILL)
    run.finish()
    wait_for_death(pids)
    done = len(committed(run.records()))
    run.start(1, DROPOUT)
    killed(run, done + 5)
    code, said = run.finish()
    assert code == 0, said
    records = assert_same(run, whole)
    steps = committed(records)
    assert [step["device_count"] for step in (steps[0], steps[-1])] == [2, 1]
    assert len({step["lr_hex"] for step in steps[:64]}) > 4, "no probe has moved the rate"
    assert kinds(records)["failure"] == 1
    assert records[-1]["goodput"]["lr_probe_s"] > 0


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
    num_kills = known = 0
    while num_kills < NUM_KILLS:
        run.start(choice.choice((1, 2, 3)), DROPOUT, "durability.checkpoint_every=3")
        for is_host in (*[False] * choice.randint(0, 2), True):
            run.wait_for(lambda records, n=known: kinds(records)["generation"] > n)
            if choice.random() < 0.5:  # While it starts, or soon after.
                time.sleep(choice.uniform(0, 1.5))
            else:
                done = len(committed(run.records()))
                run.wait_for_step(min(done + choice.randint(0, 3), TOTAL_STEPS - 1))
            known, pids = kinds(run.records())["generation"], run.trainer_pids()
            alive = [pid for pid in pids if is_alive(pid)]
            if alive and not is_host:
                victim = choice.choice(alive)
                os.kill(victim, signal.SIGKILL)
                wait_for_death([victim])
                num_kills += 1
        run.kill(signal.SIGKILL)
        code, said = run.finish()
        assert code == -signal.SIGKILL, said
        wait_for_death(pids)
        num_kills += 1
    run.train(2, DROPOUT)
    records = assert_same(run, reference)
    assert kinds(records)["start"] > NUM_KILLS // 3
    assert kinds(records)["failure"] > 0
    steps = committed(records)
    assert len({step["ids_sha256"] for step in steps}) == TOTAL_STEPS
    expected = {example for read in reads(reference.path) for example in read["ids"]}
    assert {example for read in reads(run.path) for example in read["ids"]} <= expected
