"""Trainers, checkpoints and time without processes: the real supervisor on a simulated machine.

Trainers take turns in an order that a random generator decides, die, hang and lose snapshots;
the supervisor can be killed between any two events. Memory files and the ledger are real.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.trainer.cadence import Cadence
from jaxserve.trainer.config import TrainConfig
from jaxserve.trainer.errors import RunError
from jaxserve.trainer.generation import Event
from jaxserve.trainer.generation_run import Base
from jaxserve.trainer.goodput import Goodput
from jaxserve.trainer.ledger import Ledger, committed_steps
from jaxserve.trainer.memory_file import MemoryFile, Phase, Status
from jaxserve.trainer.metrics_log import MetricsLog
from jaxserve.trainer.run_checkpoints import SaveOutcome
from jaxserve.trainer.run_folder import RunFolder
from jaxserve.trainer.run_services import RunServices, Signals
from jaxserve.trainer.supervisor import Supervisor
from tests.trainer.plain_view import PlainView
from tests.trainer.toy_trainer import FINGERPRINT, LAYOUT

TURN_S = 0.01


class SupervisorKilled(Exception):
    """The supervisor's process ends here, with all its memory."""


@dataclass
class Rates:
    """Chances of faults, each of one turn."""

    death: float = 0.0
    damage: float = 0.0
    supervisor_death: float = 0.0
    failed_save: float = 0.0


@dataclass
class Machine:
    """What outlives the supervisor: the disk; and what decides everything: the random numbers.

    Attributes:
        checkpoints: step -> state, of saves that were acknowledged.
        executed: ids of every step that any generation computed, with the step.
        num_deaths: of trainers.
    """

    config: TrainConfig
    folder: Path
    rates: Rates
    random: random.Random
    checkpoints: dict[int, bytes] = field(default_factory=dict)
    executed: list[tuple[int, str]] = field(default_factory=list)
    now_s: float = 0.0
    epoch: int = 0
    num_deaths: int = 0
    num_supervisor_deaths: int = 0

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds

    def hits(self, rate: float) -> bool:
        return self.random.random() < rate

    def run_once(self) -> int | None:
        """One life of a supervisor: its exit code, or None if it was killed."""
        self.epoch += 1
        store = SimulatedStore(self)
        ledger = Ledger(self.folder / "ledger.jsonl", epoch=self.epoch,
                        check_lease=store.check_lease, clock=self.clock)  # fmt: skip
        services = RunServices(
            self.config, RunFolder(self.folder), ledger, store,  # type: ignore[arg-type]
            MetricsLog(self.folder / "metrics.jsonl"), Goodput(self.clock), PlainView(), Signals(),
            clock=self.clock, sleep=self.sleep,
        )  # fmt: skip
        supervisor = Supervisor(
            services,
            start_generation=lambda number, placement, _: SimulatedGeneration(  # type: ignore[arg-type,return-value]
                self, number, placement.processes
            ),
            restore=lambda limit: store.restore(limit),
            check_numerics=lambda _: None,
        )
        try:
            base = store.restore(None)
            known = max(committed_steps(ledger.records), default=-1) + 1
            assert base.step <= known, "a checkpoint is ahead of the ledger"
            if base.step < known:
                supervisor.roll_back(base.step, known, supervisor.last_generation + 1, "restart")
            return supervisor.run(base)
        except SupervisorKilled:
            self.num_supervisor_deaths += 1
            return None
        except RunError as error:
            if "could not be saved" not in str(error):
                raise
            return None  # The last save failed; the user starts the command again.


class SimulatedStore:
    """See `RunCheckpoints`: saves take a few polls, and may fail."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self.epoch = machine.epoch
        self._saving: tuple[int, bytes, int] | None = None
        self.last_durable: int | None = None
        self.num_failed = 0

    @property
    def is_busy(self) -> bool:
        return self._saving is not None

    def check_lease(self) -> None:
        assert self.epoch == self._machine.epoch, "a fenced writer went on"

    def restore(self, limit: int | None) -> Base:
        steps = [s for s in self._machine.checkpoints if limit is None or s <= limit]
        if not steps:
            return Base(0, None, None)
        self.last_durable = max(steps)
        state = np.frombuffer(self._machine.checkpoints[max(steps)], np.uint8).copy()
        return Base(max(steps), state, LAYOUT)

    def set_aside_after(self, step: int, reason: str) -> list[int]:
        moved = [s for s in self._machine.checkpoints if s > step]
        for one in moved:
            del self._machine.checkpoints[one]
        if self._saving is not None and self._saving[0] > step:
            self._saving = None
        if self.last_durable is not None and self.last_durable > step:
            self.last_durable = max(self._machine.checkpoints, default=None)
        return moved

    def begin_save(self, step: int, layout: Any, state: Any, metadata: Any) -> None:
        self.check_lease()
        assert self._saving is None
        assert step not in self._machine.checkpoints
        assert int(LAYOUT.scalar(state, "next_step")) == step
        self._saving = (step, state.tobytes(), self._machine.random.randrange(5))

    def poll(self, *, wait: bool = False) -> SaveOutcome | None:
        if self._saving is None:
            return None
        step, state, turns = self._saving
        if turns and not wait:
            self._saving = (step, state, turns - 1)
            return None
        self._saving = None
        if self._machine.hits(self._machine.rates.failed_save):
            self.num_failed += 1
            return SaveOutcome(step, OSError("disk full"))
        self._machine.checkpoints[step] = state
        self.last_durable = step
        return SaveOutcome(step, None)


@dataclass
class _Rank:
    step: int = 0
    slot: int = 0
    last: int = -1
    has_stopped: bool = False


class SimulatedGeneration:
    """See `Generation`."""

    def __init__(self, machine: Machine, number: int, num_ranks: int) -> None:
        self.number = number
        self.num_trainers = num_ranks
        self.pids = list(range(number * 100, number * 100 + num_ranks))
        self.memory = MemoryFile.create(num_ranks)
        edges = [rank * LAYOUT.size_bytes // num_ranks for rank in range(num_ranks + 1)]
        self.ranges = [[(a, b - a)] for a, b in pairwise(edges)]
        self._machine = machine
        self._ranks = [_Rank() for _ in range(num_ranks)]
        self._state = np.zeros(LAYOUT.size_bytes, np.uint8)
        self._at = 0
        self._orders: dict[str, Any] = {"run_until": 0, "snapshot_until": 0}
        self._cadence: Cadence | None = None
        self._said: list[Event] = [
            Event(rank, {"hello": rank, "layout": LAYOUT.to_json(), "num_devices": num_ranks,
                         "fingerprint": FINGERPRINT.to_json()})
            for rank in range(num_ranks)
        ]  # fmt: skip
        self._is_dead = False

    def tell(self, message: dict[str, Any]) -> None:
        for name in ("run_until", "snapshot_until"):
            self._orders[name] = max(self._orders[name], message.get(name, 0))
        if "drain_at" in message:
            self._orders["drain_at"] = message["drain_at"]
        if "start" in message:
            self._begin(message["start"])

    def poll(self, timeout_s: float) -> list[Event]:
        machine = self._machine
        machine.now_s += TURN_S
        if machine.hits(machine.rates.supervisor_death):
            raise SupervisorKilled
        if not self._is_dead:
            for _ in range(machine.random.randrange(8)):
                self._turn(machine.random.randrange(self.num_trainers))
            if self._cadence is not None and machine.hits(machine.rates.death):
                machine.num_deaths += 1
                self._is_dead = True
                rank = machine.random.randrange(self.num_trainers)
                self._said.append(Event(rank, {"ended": "died", "code": -9}))
        # Messages of one trainer stay in order; the supervisor may see only some of them.
        cut = machine.random.randint(0, len(self._said)) if timeout_s else len(self._said)
        heard, self._said = self._said[:cut], self._said[cut:]
        return heard

    def statuses(self) -> list[Status]:
        now_s = self._machine.now_s
        return [Status(now_s, Phase.WAITING, rank.step, now_s) for rank in self._ranks]

    def find_stuck(self) -> list[int]:
        raise AssertionError("nobody hangs here")

    def finish(self) -> None:
        self._is_dead = True

    def kill(self) -> None:
        self._is_dead = True
        memory, machine = self.memory, self._machine
        if memory.state_bytes and machine.hits(machine.rates.damage):
            slot = machine.random.randrange(2)
            memory.slot(slot)[machine.random.randrange(memory.state_bytes)] ^= 1

    def close(self) -> None:
        pass

    def _begin(self, start: dict[str, Any]) -> None:
        self.memory.attach_slots(start["state_bytes"])
        self._cadence = Cadence(**start["cadence"])
        self._at = start["step"]
        for rank in self._ranks:
            rank.step = start["step"]
            if start["slot"] is not None:
                rank.slot, rank.last = 1 - start["slot"], start["step"]
        if start["slot"] is not None:
            self._state[:] = self.memory.slot(start["slot"])
            assert int(LAYOUT.scalar(self._state, "next_step")) == start["step"]

    def _turn(self, number: int) -> None:
        rank, cadence = self._ranks[number], self._cadence
        if cadence is None or rank.has_stopped:
            return
        is_end = rank.step in (cadence.total_steps, self._orders.get("drain_at"))
        is_due = rank.last != rank.step and (is_end or cadence.is_snapshot(rank.step))
        if is_due and rank.step > 0:
            self._snapshot(number, rank)
        elif is_end:
            rank.has_stopped = True
            self._said.append(Event(number, {"stopped": rank.step}))
        elif rank.step < self._orders["run_until"] and rank.step == min(
            one.step for one in self._ranks
        ):
            self._step(number, rank)

    def _step(self, number: int, rank: _Rank) -> None:
        if rank.step == self._at:  # The first one that gets there computes it for all.
            if any(one.last < one.step and self._is_due(one.step) for one in self._ranks):
                return  # The exchange waits for a trainer that still writes its snapshot.
            self._compute(rank.step)
        rank.step += 1
        if number == 0:
            self._said.append(Event(0, {"step": rank.step - 1, "seconds": TURN_S,
                                        "record": self._record(rank.step - 1)}))  # fmt: skip

    def _is_due(self, step: int) -> bool:
        assert self._cadence is not None
        return step > 0 and self._cadence.is_snapshot(step)

    def _compute(self, step: int) -> None:
        digest = ids_sha256(step)
        self._machine.executed.append((step, digest))
        params = LAYOUT.vector(self._state, "params").reshape(-1)
        params[:8] = np.frombuffer(
            hashlib.sha256(params[:8].tobytes() + digest.encode()).digest(), "<u4"
        ).astype(np.float32)
        LAYOUT.scalar(self._state, "next_step")[...] = step + 1
        self._at = step + 1

    def _record(self, step: int) -> dict[str, Any]:
        return {"step": step, "ids_sha256": ids_sha256(step), "loss_hex": "3f800000",
                "grad_norm_hex": "00000000", "lr_hex": "00000000", "num_tokens": 1,
                "verdict": "applied", "data_wait_s": 0.0, "probe_s": 0.0}  # fmt: skip

    def _snapshot(self, number: int, rank: _Rank) -> None:
        # All ranks are at this step's end: the state is that of `rank.step`.
        if rank.step > self._orders["snapshot_until"] or self._at != rank.step:
            return
        self.memory.begin_snapshot(rank.slot, number)
        for offset, size in self.ranges[number]:
            part = slice(offset, offset + size)
            self.memory.slot(rank.slot)[part] = self._state[part]
        self.memory.stamp(rank.slot, number, rank.step, self.ranges[number])
        self._said.append(Event(number, {"snapshot": rank.step, "slot": rank.slot}))
        rank.slot, rank.last = 1 - rank.slot, rank.step


def ids_sha256(step: int) -> str:
    """Stands for a step's examples."""
    return hashlib.sha256(str(step).encode()).hexdigest()


def final_state(total_steps: int) -> bytes:
    """What an uninterrupted run ends with, computed without any of the above."""
    params = np.zeros(8, np.float32)
    for step in range(total_steps):
        digest = hashlib.sha256(params.tobytes() + ids_sha256(step).encode()).digest()
        params = np.frombuffer(digest, "<u4").astype(np.float32)
    return params.tobytes()
