"""Any sequence of deaths, damage, failed saves and restarts: the supervisor's promises hold."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.trainer.config import load_config
from tests.trainer.independent_reader import committed, ledger_records
from tests.trainer.run_driver import CONFIG
from tests.trainer.simulated_host import Machine, Rates, final_state, ids_sha256
from tests.trainer.toy_trainer import LAYOUT

MAX_LIVES = 60
SHARED_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where fsync costs nothing."""


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    total_steps=st.integers(1, 25),
    snapshot_every=st.integers(1, 5),
    checkpoint_every=st.integers(1, 8),
    placements=st.lists(st.integers(1, 5), min_size=MAX_LIVES, max_size=MAX_LIVES),
    death=st.sampled_from([0.0, 0.01, 0.03]),
    damage=st.sampled_from([0.0, 0.3]),
    supervisor_death=st.sampled_from([0.0, 0.01]),
    failed_save=st.sampled_from([0.0, 0.2]),
)
def test_promises_hold_under_any_faults(
    seed: int,
    total_steps: int,
    snapshot_every: int,
    checkpoint_every: int,
    placements: list[int],
    death: float,
    damage: float,
    supervisor_death: float,
    failed_save: float,
) -> None:
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as name:
        folder = Path(name)
        (folder / "logs").mkdir()
        (folder / "requests").mkdir()
        path = folder / "c.toml"
        path.write_text(CONFIG.format(run=folder, total_steps=total_steps, data="d", cache="c"))
        machine = Machine(None, folder, Rates(death, damage, supervisor_death, failed_save),  # type: ignore[arg-type]
                          random.Random(seed))  # fmt: skip
        code = None
        for life in range(MAX_LIVES):
            if life == MAX_LIVES - 20:
                machine.rates = Rates()  # Faults end at some time.
            machine.config = load_config(
                path,
                [f"durability.snapshot_every={snapshot_every}", "supervision.max_failures=1000",
                 f"durability.checkpoint_every={checkpoint_every}",
                 f"placement.processes={placements[life]}", "schedule.warmup=0"],
            )  # fmt: skip
            code = machine.run_once()
            if code is not None:
                break
        assert code == 0
        _check(machine, total_steps)
        if not machine.num_supervisor_deaths and not damage and not failed_save:
            # The deaths of trainers alone cost no committed step.
            assert not [r for r in _records(machine) if r["kind"] == "rollback"]


def _records(machine: Machine) -> list[dict[str, Any]]:
    return ledger_records(machine.folder / "ledger.jsonl")


def _check(machine: Machine, total_steps: int) -> None:
    records = _records(machine)
    # One writer an epoch, epochs in order, generations in order.
    epochs = [record["epoch"] for record in records]
    assert epochs == sorted(epochs)
    generations = [r["generation"] for r in records if r["kind"] == "generation"]
    assert generations == sorted(set(generations))
    # Exactly once: one line a step, each with its own examples. `committed` fails on a gap.
    steps = committed(records)
    assert [step["ids_sha256"] for step in steps] == [ids_sha256(n) for n in range(total_steps)]
    # What was computed again was computed with the same examples.
    assert all(digest == ids_sha256(step) for step, digest in machine.executed)
    assert len(machine.executed) >= total_steps
    # The last checkpoint is the state of an uninterrupted run.
    state = machine.checkpoints[total_steps]
    array = memoryview(bytearray(state))
    assert LAYOUT.vector(array, "params").reshape(-1)[:8].tobytes() == final_state(total_steps)
