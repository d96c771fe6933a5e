"""Watching over one generation: permits, commits, checkpoints, and how it ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxserve.trainer.balance import Balance
from jaxserve.trainer.cadence import Cadence
from jaxserve.trainer.commit import CommitTracker
from jaxserve.trainer.control import Message
from jaxserve.trainer.errors import MemoryFileError, RunError
from jaxserve.trainer.generation import Event, Generation
from jaxserve.trainer.memory_file import NUM_SLOTS, Bytes, Phase, Ranges, whole_by_first
from jaxserve.trainer.metrics_log import float_of_hex
from jaxserve.trainer.run_services import RunServices, StopRequest
from jaxserve.trainer.state_layout import StateLayout
from jaxserve.watchdog import Watchdog

POLL_S = 0.1
LEDGER_RETRY_EVERY_S = 1.0

Ending = Literal["finished", "stopped", "failed", "rollback", "fatal"]


@dataclass(frozen=True)
class Base:
    """What a generation starts from.

    Attributes:
        step: the next step.
        state: its bytes; None: the fresh state of step 0.
        layout: of the bytes; None: not yet known, as in a new run.
    """

    step: int
    state: Bytes | None
    layout: StateLayout | None


@dataclass(frozen=True)
class Outcome:
    """How a generation ended.

    Attributes:
        ending: "finished": all steps are done. "stopped": as asked for. "failed": trainers
            died or were stuck. "rollback": the trainers ask for it. "fatal": trying again
            would not help.
        detail: for people.
        rollback_to: of "rollback": the latest step to go on from.
    """

    ending: Ending
    detail: str = ""
    rollback_to: int | None = None


class GenerationRun:
    """The supervisor's work while one generation lives.

    Attributes:
        layout: of the state; None until the trainers have said it.
        committed: next step up to which the ledger has lines.
    """

    def __init__(
        self,
        services: RunServices,
        generation: Generation,
        base: Base,
        check_numerics: Callable[[dict[str, Any]], None],
        balance: Balance | None = None,
    ) -> None:
        """
        Args:
            services: of the run.
            generation: has just been forked.
            base: what it starts from.
            check_numerics: raises RunError when the trainers would compute other bits than the
                run's earlier ones.
            balance: notices slow trainers; None: nobody does.
        """
        self.layout = base.layout
        self.committed = base.step
        self._services = services
        self._generation = generation
        self._base = base
        self._check_numerics = check_numerics
        self._balance = balance
        self._cadence: Cadence | None = None
        self._tracker: CommitTracker | None = None
        self._hellos: dict[int, Message] = {}
        self._stopped: dict[int, int] = {}
        self._outcome: Outcome | None = None
        self._uncommitted: list[dict[str, Any]] = []
        self._uncommitted_since_s: float | None = None
        self._retry_s = 0.0
        self._snapshot_permit = 0
        self._due_save: int | None = None
        self._drain_deadline_s: float | None = None
        self._slot_ranges: dict[int, Sequence[Ranges]] = {}
        self._committed_at_s = self._ended_at_s = services.clock()
        supervision = services.config.supervision
        self._watchdog = Watchdog(
            supervision.watchdog_s, supervision.start_timeout_s, services.clock()
        )

    @property
    def seconds_uncommitted(self) -> float:
        """Seconds from the last commit to the end: what a failure costs beside the restart."""
        return self._ended_at_s - self._committed_at_s

    @property
    def has_stopped(self) -> bool:
        """Whether all trainers have done what they were to do and wait for their end."""
        return len(self._stopped) == self._generation.num_trainers

    def run(self) -> Outcome:
        """Returns when the generation has ended; its trainers may still have to be killed."""
        while self._outcome is None:
            for event in self._generation.poll(POLL_S):
                self._on_event(event)
            self._tick()
        return self._outcome

    def take_leftovers(self) -> None:
        """After the trainers were killed: what they had done before still counts."""
        for event in self._generation.poll(0):
            if "step" in event.message or "snapshot" in event.message:
                self._on_event(event)
        if self._uncommitted_since_s is not None:
            self._flush()

    def best_base(self, limit: int | None = None) -> Base | None:
        """The newest state in memory that is whole, at most at step `limit`.

        It is a view of the memory file, which must live as long as it.
        """
        memory, found = self._generation.memory, []
        if self._tracker is None:
            return self._base
        for slot in range(NUM_SLOTS):
            step = memory.complete_step(slot)
            if 0 <= step <= min(self.committed, self.committed if limit is None else limit):
                found.append((step, slot))
        for step, slot in sorted(found, reverse=True):
            try:
                memory.verify(slot, self._slot_ranges[slot])
            except MemoryFileError as error:
                self._services.view.say(str(error), warn=True)
                continue
            return Base(step, memory.slot(slot), self.layout)
        if self._base.state is None and not found and self.committed == 0:
            return Base(0, None, self.layout)
        return None

    def owns(self, base: Base) -> bool:
        """Whether a base's state lies in this generation's memory."""
        memory, state = self._generation.memory, base.state
        return bool(memory.state_bytes and state is not None) and any(
            np.shares_memory(state, memory.slot(slot)) for slot in range(NUM_SLOTS)
        )

    # What trainers say.

    def _on_event(self, event: Event) -> None:
        message, rank = event.message, event.rank
        if "step" in message:
            self._on_step(message)
        elif "snapshot" in message:
            self._on_snapshot(rank, message)
        elif "hello" in message:
            self._on_hello(rank, message)
        elif "evaluation" in message:
            self._on_evaluation(message)
        elif "stopped" in message:
            self._on_stopped(rank, message["stopped"])
        elif "preempted" in message:
            self._services.preempt(f"trainer {rank}")
        elif "failed" in message:
            ending: Ending = "fatal" if message.get("is_fatal") else "failed"
            self._end(ending, f"trainer {rank}: {message['failed']}")
        elif "ended" in message:
            if message["code"] == -15:  # SIGTERM, before the trainer could pass it on.
                self._services.preempt(f"trainer {rank}")
            self._end("failed", f"trainer {rank} {message['ended']}")

    def _on_hello(self, rank: int, message: Message) -> None:
        self._hellos[rank] = message
        self._watchdog.reset(self._services.clock())
        if len(self._hellos) < self._generation.num_trainers:
            return
        first = self._hellos[0]
        self._check_numerics(first["fingerprint"])
        layout = StateLayout.from_json(first["layout"])
        if self.layout is not None and self.layout.digest() != layout.digest():
            self._end("fatal", "the checkpoint's state is laid out in another way than this "
                      "version's: resume it with the version that wrote it")  # fmt: skip
            return
        self.layout = layout
        memory = self._generation.memory
        memory.make_slots(layout.size_bytes)
        slot = None
        if self._base.state is not None:
            slot = 0
            memory.put(slot, self._base.step, self._base.state)
            self._slot_ranges[slot] = whole_by_first(layout.size_bytes, memory.num_trainers)
        self._cadence = self._services.config.cadence(layout.size_bytes)
        self._tracker = CommitTracker(self._cadence, memory.num_trainers, self._base.step, slot)
        self._snapshot_permit = self._tracker.snapshot_until
        if self._services.goodput.current == "init":
            self._services.goodput.switch("compile")
        start = {
            "state_bytes": layout.size_bytes,
            "step": self._base.step,
            "slot": slot,
            "cadence": self._cadence.to_json(),
        }
        self._generation.tell({"start": start, **self._permits()})

    def _on_step(self, message: Message) -> None:
        assert self._tracker is not None
        now_s = self._services.clock()
        goodput = self._services.goodput
        record = {**message["record"], "seconds": round(message["seconds"], 6)}
        self._tracker.on_step(message["step"], record)
        self._watchdog.step(message["seconds"], now_s)
        if goodput.current != "step":  # The first one compiles.
            goodput.switch("step")
            self._committed_at_s = now_s
        else:
            goodput.move(record["data_wait_s"], "step", "data_wait")
            goodput.move(record["probe_s"], "step", "lr_probe")
        if record["verdict"] == "rollback":
            self._end("rollback", record.get("reason", ""), record["rollback_to"])
            self._services.quarantined_ids.update(record["suspect_ids"])
            return
        self._generation.tell(self._permits())
        self._rebalance(now_s)

    def _rebalance(self, now_s: float) -> None:
        if self._balance is None or self._services.request is not None:
            return
        computed_s = [status.computed_s for status in self._generation.statuses()]
        speeds = self._balance.step(computed_s, now_s)
        if speeds is not None:
            self._services.request = StopRequest("rebalance", speeds=speeds)

    def _on_snapshot(self, rank: int, message: Message) -> None:
        assert self._tracker is not None
        slot = message["slot"]
        records = self._tracker.on_snapshot(rank, slot, message["snapshot"])
        if rank == 0:
            self._services.goodput.move(message.get("waited_s", 0.0), "step", "ckpt_stall")
        if records is not None:
            self._slot_ranges[slot] = self._generation.ranges
            self._uncommitted += records
            self._flush()

    def _on_evaluation(self, message: Message) -> None:
        self._watchdog.reset(self._services.clock())
        loss = float_of_hex(message["loss_hex"])
        self._services.goodput.move(message["seconds"], "step", "evaluation")
        self._services.ledger.note(
            kind="evaluation",
            generation=self._generation.number,
            next_step=message["evaluation"],
            loss_hex=message["loss_hex"],
            num_tokens=message["num_tokens"],
        )
        self._services.metrics.write({"step": message["evaluation"] - 1, "evaluation_loss": loss})
        self._services.view.say(f"step {message['evaluation']}: evaluation loss {loss:.4f}")

    def _on_stopped(self, rank: int, step: int) -> None:
        self._stopped[rank] = step

    def _end_if_all_stopped(self) -> None:
        if self.has_stopped and self._uncommitted_since_s is None:
            assert self._cadence is not None
            is_all = self._stopped[0] == self._cadence.total_steps
            self._end("finished" if is_all else "stopped")

    # What is due.

    def _tick(self) -> None:
        services = self._services
        services.look_for_requests()
        now_s = services.clock()
        if self._uncommitted_since_s is not None and now_s >= self._retry_s:
            self._flush()
        self._look_after_saves()
        self._end_if_all_stopped()
        if services.request is not None and self._outcome is None:
            self._drain(now_s)
        if self._outcome is None:
            self._watch(now_s)

    def _drain(self, now_s: float) -> None:
        tracker = self._tracker
        assert self._services.request is not None
        if self._drain_deadline_s is None:
            self._drain_deadline_s = now_s + self._services.config.supervision.drain_timeout_s
            if tracker is None or tracker.reached == self._base.step:
                # Nothing was done yet, so nothing is lost; a compilation may take minutes.
                self._end("stopped", "before its first step")
                return
            self._generation.tell({"drain_at": tracker.drain()})
        elif self._services.is_hurried or now_s > self._drain_deadline_s:
            self._end("stopped", "without waiting for the steps under way")

    def _watch(self, now_s: float) -> None:
        statuses = self._generation.statuses()
        slow = (Phase.EVALUATING, Phase.COMPILING, Phase.STARTING, Phase.RESTORING)
        is_patient = any(status.phase in slow for status in statuses)
        if self._is_held_up():
            self._watchdog.reset(now_s)
        if not self._watchdog.is_overdue(now_s, is_patient=is_patient):
            return
        stuck = self._generation.find_stuck()
        silence_s = self._watchdog.silence_s(now_s)
        rows = [
            {"rank": rank, "phase": status.phase.name.lower(), "next_step": status.step,
             "alive_before_s": round(max(0.0, now_s - status.alive_s), 3)}
            for rank, status in enumerate(statuses)
        ]  # fmt: skip
        self._services.ledger.note(
            kind="stuck",
            generation=self._generation.number,
            ranks=stuck,
            silence_s=round(silence_s, 3),
            trainers=rows,
        )
        self._generation.dump_stacks()
        names = ", ".join(str(rank) for rank in stuck)
        self._end("failed", f"trainer {names} is stuck: no step for {silence_s:.0f} s; the stacks "
                  "of all are in logs/")  # fmt: skip

    def _is_held_up(self) -> bool:
        """Whether the trainers wait for the supervisor, and not the other way round."""
        return self._uncommitted_since_s is not None or self._due_save is not None

    # Commits and saves.

    def _flush(self) -> None:
        """Writes what is committed into the ledger; only then may snapshots go on."""
        services = self._services
        assert self._tracker is not None
        lines = [self._step_line(record) for record in self._uncommitted]
        try:
            services.ledger.append(lines)
        except OSError as error:
            self._hold_up(error)
            return
        self._uncommitted, self._uncommitted_since_s = [], None
        self.committed = self._tracker.committed
        self._committed_at_s = services.clock()
        for line in lines:
            self._show(line)
        self._snapshot_permit = self._tracker.snapshot_until
        assert self._cadence is not None
        if self._cadence.is_checkpoint(self.committed) and self.committed > self._base.step:
            self._due_save = self.committed
            self._tracker.pin()
        self._look_after_saves()
        self._generation.tell(self._permits())

    def _hold_up(self, error: OSError) -> None:
        now_s = self._services.clock()
        self._retry_s = now_s + LEDGER_RETRY_EVERY_S
        if self._uncommitted_since_s is None:
            self._uncommitted_since_s = now_s
            self._services.view.say(
                f"the ledger cannot be written ({error}); training waits", warn=True
            )
        limit_s = self._services.config.durability.ledger_retry_s
        if now_s - self._uncommitted_since_s > limit_s:
            self._end("fatal", f"the ledger could not be written for {limit_s:g} s: {error}. Make "
                      "room on the disk and start the same command again")  # fmt: skip

    def _step_line(self, record: dict[str, Any]) -> dict[str, Any]:
        hidden = ("data_wait_s", "probe_s")
        fields = {name: value for name, value in record.items() if name not in hidden}
        return {
            "kind": "step",
            "generation": self._generation.number,
            "device_count": int(self._hellos[0]["num_devices"]),
            "pids": self._generation.pids,
            **fields,
        }

    def _show(self, line: dict[str, Any]) -> None:
        metrics = {
            "step": line["step"],
            "loss": float_of_hex(line["loss_hex"]),
            "grad_norm": float_of_hex(line["grad_norm_hex"]),
            "lr": float_of_hex(line["lr_hex"]),
            "num_tokens": line["num_tokens"],
            "seconds": line["seconds"],
            "generation": line["generation"],
            "device_count": line["device_count"],
            "verdict": line["verdict"],
            "ckpt_failures_total": self._services.checkpoints.num_failed,
        }
        self._services.metrics.write(metrics)
        self._services.view.step(metrics)

    def _look_after_saves(self) -> None:
        services = self._services
        outcome = services.checkpoints.poll()
        if outcome is not None and outcome.error is None:
            services.ledger.note(
                kind="checkpoint", generation=self._generation.number, next_step=outcome.step
            )
        elif outcome is not None:
            tell_failed_save(services, outcome.step, outcome.error, self._generation.number)
        if self._due_save is not None and not services.checkpoints.is_busy:
            self._begin_save()

    def _begin_save(self) -> None:
        tracker, layout, step = self._tracker, self.layout, self._due_save
        assert tracker is not None
        assert layout is not None
        assert step is not None
        base = self.best_base(step)
        if base is None or base.step != step or base.state is None:
            raise RunError(f"the snapshot of step {step} is damaged while its trainers live")
        self._services.checkpoints.begin_save(
            step, layout, base.state, {"generation": self._generation.number}
        )
        self._due_save = None
        tracker.unpin()
        self._snapshot_permit = tracker.snapshot_until
        self._generation.tell(self._permits())

    def _permits(self) -> Message:
        assert self._tracker is not None
        return {"run_until": self._tracker.run_until, "snapshot_until": self._snapshot_permit}

    def _end(self, ending: Ending, detail: str = "", rollback_to: int | None = None) -> None:
        # The first reason is the cause, later ones follow from it.
        if self._outcome is None:
            self._outcome = Outcome(ending, detail, rollback_to)
            self._ended_at_s = self._services.clock()


def tell_failed_save(
    services: RunServices, step: int, error: BaseException | None, generation: int
) -> None:
    """Makes a failed save known at once, everywhere, and does what the config says."""
    services.view.say(f"checkpoint {step} failed: {error}", warn=True)
    services.metrics.write(
        {"step": step - 1, "ckpt_failures_total": services.checkpoints.num_failed}
    )
    services.ledger.note(
        kind="checkpoint_failed",
        generation=generation,
        next_step=step,
        error=str(error)[:1000],
    )
    if services.config.durability.on_save_failure == "stop" and services.request is None:
        services.request = StopRequest("save_failed")
