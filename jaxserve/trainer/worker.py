"""A trainer: computes steps as far as the supervisor permits, and writes snapshots.

It knows arrays and the memory file; it writes nothing to the disk but its log.
"""

from __future__ import annotations

import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from jaxserve import SIBLING_PACKAGES
from jaxserve.errors import JaxserveError
from jaxserve.trainer.cadence import Cadence
from jaxserve.trainer.control import Channel, Message
from jaxserve.trainer.errors import MemoryFileError
from jaxserve.trainer.fingerprint import NumericsFingerprint
from jaxserve.trainer.launch import Place
from jaxserve.trainer.memory_file import MemoryFile, Phase, whole_by_first
from jaxserve.trainer.step_record import Runner, StepRecord

HEARTBEAT_S = 0.5
EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_ORPHANED = 3


def main(
    spec: Mapping[str, Any],
    channel: Channel,
    memory_fd: int,
    make_runner: Callable[[Mapping[str, Any]], tuple[Runner, NumericsFingerprint]],
) -> int:
    """The trainer's life, in a process of its own.

    Args:
        spec: `place`, `generation`, `config`, `world`, `quarantined_ids`, `weights`.
        channel: to the supervisor.
        memory_fd: the generation's memory file.
        make_runner: from `spec`: what computes, and what its bits depend on.

    Returns:
        The exit code.
    """
    place = Place(**spec["place"])
    memory = MemoryFile(memory_fd, place.num_processes)
    link = Link(channel, memory, place.rank)
    memory.set_phase(place.rank, Phase.STARTING, 0)
    link.start()
    try:
        runner, fingerprint = make_runner(spec)
        if place.num_processes > 1:
            runner.on_exchange = partial(memory.begin_exchange, place.rank)
        link.say(_introduction(runner, fingerprint, place.rank))
        start = link.wait_for_start()
        if start is not None:
            memory.attach_slots(start["state_bytes"])
            _Trainer(runner, link, memory, place.rank, Cadence(**start["cadence"])).run(start)
        runner.close()
    except Exception as error:
        traceback.print_exc()
        message = f"{type(error).__name__}: {error}"[:4000]
        link.say({"failed": message, "is_fatal": is_users(error)})
        return EXIT_FAILED
    memory.set_phase(place.rank, Phase.DONE, memory.status(place.rank).step)
    return EXIT_DONE


def _introduction(runner: Runner, fingerprint: NumericsFingerprint, rank: int) -> Message:
    said: Message = {"hello": rank, "ranges": [list(pair) for pair in runner.state_ranges()]}
    if rank == 0:
        said |= {
            "layout": runner.layout.to_json(),
            "num_devices": runner.num_devices,
            "fingerprint": fingerprint.to_json(),
        }
    return said


@dataclass
class _Orders:
    """What the supervisor has said last."""

    run_until: int = 0
    snapshot_until: int = 0
    drain_at: int | None = None
    start: Message | None = None
    is_over: bool = False


class Link:
    """A trainer's side of the control channel: a thread hears orders, beats the heart and
    passes SIGTERM on, whatever the main thread is waiting for."""

    def __init__(self, channel: Channel, memory: MemoryFile, rank: int) -> None:
        self._channel = channel
        self._memory = memory
        self._rank = rank
        self._orders = _Orders()
        self._changed = threading.Condition()
        self._say_lock = threading.Lock()
        self._wakeup_read, self._wakeup_write = os.pipe()

    def start(self) -> None:
        """Begins to listen. SIGTERM from now on asks the supervisor for the end of the run."""
        os.set_blocking(self._wakeup_write, False)
        signal.set_wakeup_fd(self._wakeup_write)
        # The byte in the pipe is what counts: it is there even while Python code cannot run.
        signal.signal(signal.SIGTERM, lambda _signal, _frame: None)
        for work in (self._listen, self._beat, self._pass_signals_on):
            threading.Thread(target=work, daemon=True).start()

    def say(self, message: Message) -> None:
        """Tells the supervisor; ends the process if there is none any more."""
        with self._say_lock:
            if not self._channel.send(message):
                os._exit(EXIT_ORPHANED)

    def wait_for_start(self) -> Message | None:
        """What the generation starts from; None: it is over before it began."""
        with self._changed:
            self._changed.wait_for(lambda: self._orders.start or self._orders.is_over)
            return self._orders.start

    def wait_to_run(self, step: int) -> bool:
        """Returns when `step` may be run; False if all stop before it."""
        orders = self._orders
        with self._changed:
            self._changed.wait_for(
                lambda: step < orders.run_until or orders.is_over or orders.drain_at is not None
            )
            return step < orders.run_until and not orders.is_over

    def wait_to_snapshot(self, next_step: int) -> float:
        """Returns when the slot to be overwritten is no longer needed. Seconds waited."""
        begin_s = time.monotonic()
        with self._changed:
            self._changed.wait_for(
                lambda: next_step <= self._orders.snapshot_until or self._orders.is_over
            )
        return time.monotonic() - begin_s

    def wait_for_end(self) -> None:
        """Returns when the supervisor has seen all that this trainer did."""
        with self._changed:
            self._changed.wait_for(lambda: self._orders.is_over)

    def _listen(self) -> None:
        while True:
            message = self._channel.receive()
            if message is None:
                os._exit(EXIT_ORPHANED)
            with self._changed:
                orders = self._orders
                orders.run_until = max(orders.run_until, message.get("run_until", 0))
                orders.snapshot_until = max(orders.snapshot_until, message.get("snapshot_until", 0))
                orders.drain_at = message.get("drain_at", orders.drain_at)
                orders.start = message.get("start", orders.start)
                orders.is_over = orders.is_over or "end" in message
                self._changed.notify_all()

    def _beat(self) -> None:
        while True:
            self._memory.beat(self._rank)
            time.sleep(HEARTBEAT_S)

    def _pass_signals_on(self) -> None:
        while number := os.read(self._wakeup_read, 1):
            if number[0] == signal.SIGTERM:
                self.say({"preempted": self._rank})


class _Trainer:
    """The loop over steps."""

    def __init__(
        self, runner: Runner, link: Link, memory: MemoryFile, rank: int, cadence: Cadence
    ) -> None:
        self._runner = runner
        self._link = link
        self._memory = memory
        self._rank = rank
        self._cadence = cadence
        self._ranges = list(runner.state_ranges())
        self._next_slot = 0
        self._last_snapshot = -1

    def run(self, start: Message) -> None:
        """Trains from the state in the memory file (or a fresh one) until told to stop."""
        step = self._restore(start)
        while True:
            if step == self._cadence.total_steps:
                break
            self._phase(Phase.WAITING, step)
            if not self._link.wait_to_run(step):
                break
            self._phase(Phase.COMPUTING, step)
            begin_s = time.monotonic()
            record = self._runner.run_step(step)
            self._tell(record, time.monotonic() - begin_s)
            if record.verdict == "rollback":
                self._link.wait_for_end()
                return
            step += 1
            self._phase(Phase.WAITING, step)
            if self._cadence.is_snapshot(step):
                self._snapshot(step)
            if self._cadence.is_evaluation(step):
                self._evaluate(step)
        if self._last_snapshot != step:
            self._snapshot(step)
        self._phase(Phase.WAITING, step)
        self._link.say({"stopped": step})
        self._link.wait_for_end()

    def _restore(self, start: Message) -> int:
        self._phase(Phase.RESTORING, start["step"])
        if start["slot"] is None:
            return self._runner.load_state(None)
        slot = int(start["slot"])
        memory = self._memory
        if memory.complete_step(slot) != start["step"]:
            raise MemoryFileError(f"slot {slot} has no state of step {start['step']}")
        memory.verify(slot, whole_by_first(memory.state_bytes, memory.num_trainers))
        step = self._runner.load_state(memory.slot(slot))
        self._next_slot, self._last_snapshot = 1 - slot, step
        return step

    def _snapshot(self, next_step: int) -> None:
        waited_s = self._link.wait_to_snapshot(next_step)
        self._phase(Phase.SNAPSHOT, next_step)
        slot = self._next_slot
        self._memory.begin_snapshot(slot, self._rank)
        self._runner.store_state(self._memory.slot(slot))
        self._memory.stamp(slot, self._rank, next_step, self._ranges)
        self._next_slot, self._last_snapshot = 1 - slot, next_step
        self._link.say({"snapshot": next_step, "slot": slot, "waited_s": waited_s})

    def _evaluate(self, next_step: int) -> None:
        self._phase(Phase.EVALUATING, next_step)
        begin_s = time.monotonic()
        record = self._runner.evaluate()
        if self._rank == 0:
            self._link.say(
                {
                    "evaluation": next_step,
                    "loss_hex": float_hex(record.loss),
                    "num_tokens": record.num_tokens,
                    "seconds": time.monotonic() - begin_s,
                }
            )

    def _tell(self, record: StepRecord, seconds: float) -> None:
        if self._rank == 0:
            self._link.say({"step": record.step, "record": step_fields(record), "seconds": seconds})

    def _phase(self, phase: Phase, step: int) -> None:
        self._memory.set_phase(self._rank, phase, step)


def is_users(error: Exception) -> bool:
    """Whether trying again cannot help: something that only the user can mend."""
    package = type(error).__module__.partition(".")[0]
    return isinstance(error, JaxserveError) or (
        isinstance(error, ValueError) and package in SIBLING_PACKAGES
    )


def float_hex(value: np.float32) -> str:
    """The bits of a float32, 8 hex digits, most significant first."""
    return np.float32(value).view(np.uint32).item().to_bytes(4, "big").hex()


def step_fields(record: StepRecord) -> dict[str, Any]:
    """A step as the ledger's line has it."""
    fields = {
        "step": record.step,
        "loss_hex": float_hex(record.loss),
        "grad_norm_hex": float_hex(record.grad_norm),
        "lr_hex": float_hex(record.lr),
        "first_index": record.first_index,
        "last_index": record.last_index,
        "ids_sha256": record.ids_sha256,
        "num_tokens": record.num_tokens,
        "verdict": record.verdict,
        "data_wait_s": round(record.data_wait_s, 6),
        "probe_s": round(record.probe_s, 6),
    }
    if record.reason:
        fields["reason"] = record.reason
    if record.verdict == "rollback":
        fields |= {"rollback_to": record.rollback_to, "suspect_ids": list(record.suspect_ids)}
    for name in ("corrupted_device", "params_digest"):
        if getattr(record, name) is not None:
            fields[name] = getattr(record, name)
    return fields
