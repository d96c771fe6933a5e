"""The supervisor of a run: generation after generation, until all steps are done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxserve.trainer.balance import Balance, Speeds
from jaxserve.trainer.config import PlacementSection
from jaxserve.trainer.errors import RunError, TrainingFailed
from jaxserve.trainer.generation import Generation
from jaxserve.trainer.generation_run import Base, GenerationRun, Outcome, tell_failed_save
from jaxserve.trainer.ledger import iterate_kind
from jaxserve.trainer.memory_file import MemoryFile
from jaxserve.trainer.run_services import RunServices

EXIT_FINISHED = 0
EXIT_PREEMPTED = 75
"""EX_TEMPFAIL: the same command goes on later."""
MAX_BACKOFF_S = 30.0
PAUSE_STEP_S = 0.05


@dataclass
class _Progress:
    """Where the run stands between two generations.

    `memory` is the file that `base.state` is a view of; None: it has memory of its own. `speeds`
    are those of the processes that shards are shared by; None: equal.
    """

    base: Base
    placement: PlacementSection
    number: int
    memory: MemoryFile | None = None
    num_failures: int = 0
    speeds: Speeds | None = None


class Supervisor:
    """Starts generations, and starts the next one from the newest state that is whole."""

    def __init__(
        self,
        services: RunServices,
        *,
        start_generation: Callable[[int, PlacementSection, Speeds | None], Generation],
        restore: Callable[[int | None], Base],
        check_numerics: Callable[[dict[str, Any]], None],
    ) -> None:
        """
        Args:
            services: of the run.
            start_generation: starts the trainers of a generation, by its number.
            restore: reads the newest good checkpoint, at most at the given step.
            check_numerics: raises RunError when trainers would compute other bits than before.
        """
        self._services = services
        self._start_generation = start_generation
        self._restore = restore
        self._check_numerics = check_numerics

    def run(self, base: Base) -> int:
        """Trains from `base` to the end, or until told to stop.

        Returns:
            The exit code: 0, or 75 when it was stopped and can go on.

        Raises:
            TrainingFailed, RunError: it cannot go on; the newest state is durable if the disk
                takes it.
        """
        progress = _Progress(base, self._services.config.placement, self.last_generation)
        try:
            while True:
                outcome = self._run_generation(progress)
                code = self._judge(outcome, progress)
                if code is not None:
                    return code
        finally:
            self._release(progress)

    @property
    def last_generation(self) -> int:
        """Number of the newest generation of the run; 0: there was none."""
        begun = iterate_kind(self._services.ledger.records, "generation")
        return max((record["generation"] for record in begun), default=0)

    # One generation.

    def _run_generation(self, progress: _Progress) -> Outcome:
        services, base = self._services, progress.base
        services.look_for_requests()
        if services.request is not None and not services.request.goes_on:
            return Outcome("stopped", "before it began")
        progress.number += 1
        try:
            generation = self._start_generation(
                progress.number, progress.placement, progress.speeds
            )
        except RunError as error:
            return Outcome("failed", str(error))
        services.ledger.note(
            kind="generation",
            generation=progress.number,
            from_step=base.step,
            processes=progress.placement.processes,
            device_count=progress.placement.num_devices,
            pids=generation.pids,
        )
        balance = Balance.of(services.config, progress.placement, progress.speeds)
        run = GenerationRun(services, generation, base, self._check_numerics, balance)
        try:
            outcome = run.run()
            services.goodput.switch("restart")
            if run.has_stopped:
                generation.finish()
        finally:
            generation.kill()
        run.take_leftovers()
        generation.close()
        self._move_on(run, generation, progress, outcome)
        return outcome

    def _move_on(
        self,
        run: GenerationRun,
        generation: Generation,
        progress: _Progress,
        outcome: Outcome,
    ) -> None:
        """Finds the state that the next generation starts from."""
        services, before = self._services, progress.base
        base = run.best_base(outcome.rollback_to)
        if base is None or self._is_newer_on_disk(base, outcome.rollback_to):
            services.view.say("the newest snapshot in memory is not whole: going back to the disk",
                              warn=True)  # fmt: skip
            base = self._restore(outcome.rollback_to)
        in_memory = run.owns(base)
        if run.committed > before.step:
            progress.num_failures = 0
        if base.step < run.committed:
            self.roll_back(base.step, run.committed, progress.number + 1, outcome.detail)
        if outcome.ending in ("failed", "rollback"):
            services.goodput.move(run.seconds_uncommitted, "step", "lost_work")
        if base.state is None or base.state is not before.state:
            self._release(progress)
            progress.memory = generation.memory if in_memory else None
        if not in_memory:
            generation.memory.close()
        progress.base = base

    def _is_newer_on_disk(self, base: Base, limit: int | None) -> bool:
        durable = self._services.checkpoints.last_durable
        return durable is not None and base.step < durable <= (durable if limit is None else limit)

    def roll_back(self, to_step: int, from_step: int, generation: int, reason: str) -> None:
        """Takes committed steps back: in the ledger, the metrics and the checkpoints."""
        self._services.ledger.append(
            [{"kind": "rollback", "generation": generation, "to_step": to_step,
              "from_step": from_step, "reason": reason[:1000]}]
        )  # fmt: skip
        self._services.metrics.drop_from(to_step)
        self._services.checkpoints.set_aside_after(to_step, f"rolled back: {reason}")

    def _release(self, progress: _Progress) -> None:
        if progress.memory is not None:
            progress.base = Base(progress.base.step, None, progress.base.layout)
            progress.memory.close()
            progress.memory = None

    # Between generations.

    def _judge(self, outcome: Outcome, progress: _Progress) -> int | None:
        """What an outcome leads to: an exit code, or None to go on."""
        services = self._services
        if outcome.ending == "finished" and progress.base.step < services.config.total_steps:
            # The last snapshot was damaged after it was written.
            self._restart(Outcome("rollback", "the last snapshot is damaged"), progress)
            return None
        if outcome.ending == "finished":
            self._save(progress, is_end=True)
            return EXIT_FINISHED
        if outcome.ending == "stopped":
            assert services.request is not None
            return self._stop(progress, outcome)
        if outcome.ending == "fatal":
            self._save(progress, is_end=True)
            raise RunError(outcome.detail)
        if outcome.ending == "rollback":
            services.ledger.note(
                kind="spike",
                generation=progress.number,
                reason=outcome.detail,
                quarantined_ids=sorted(services.quarantined_ids),
            )
            services.view.say(f"going back to step {progress.base.step}: {outcome.detail}",
                              warn=True)  # fmt: skip
        self._restart(outcome, progress)
        return None

    def _stop(self, progress: _Progress, outcome: Outcome) -> int | None:
        services = self._services
        request = services.request
        assert request is not None
        if request.reason == "resize" and request.placement is not None:
            services.ledger.note(
                kind="resize",
                generation=progress.number,
                next_step=progress.base.step,
                processes=request.placement.processes,
                device_count=request.placement.num_devices,
            )
            services.view.say(f"going on with {request.placement.num_devices} devices")
            progress.placement, progress.speeds = request.placement, None
            services.request = None
            return None
        if request.speeds is not None:
            services.ledger.note(
                kind="rebalance",
                generation=progress.number,
                next_step=progress.base.step,
                speeds=[round(one, 6) for one in request.speeds],
            )
            services.view.say("a trainer is slow: sharing the work anew by their speeds")
            progress.speeds, services.request = request.speeds, None
            return None
        self._save(progress, is_end=True)
        services.ledger.note(
            kind="stop",
            generation=progress.number,
            next_step=progress.base.step,
            reason=request.reason,
            detail=outcome.detail,
            goodput=services.goodput.summary(),
        )
        if request.reason == "save_failed":
            raise RunError(
                "stopped because a checkpoint could not be saved (durability.on_save_failure is "
                f"'stop'). Make room for {services.folder.checkpoints}, then start the same "
                "command again"
            )
        return EXIT_PREEMPTED

    def _restart(self, outcome: Outcome, progress: _Progress) -> None:
        services = self._services
        limit = services.config.supervision.max_failures
        progress.num_failures += 1
        services.ledger.note(
            kind="failure",
            generation=progress.number,
            next_step=progress.base.step,
            detail=outcome.detail[:1000],
        )
        if progress.num_failures >= limit and outcome.ending == "failed":
            self._save(progress, is_end=True)
            raise TrainingFailed(
                f"{limit} generations in a row failed without a new step; the last one because: "
                f"{outcome.detail}. Their output is in {services.folder.logs}"
            )
        services.view.say(
            f"generation {progress.number} ended ({outcome.detail}); going on from step "
            f"{progress.base.step}", warn=True,
        )  # fmt: skip
        if progress.num_failures > 1:
            services.goodput.switch("idle")
            self._pause(min(MAX_BACKOFF_S, 2.0 ** (progress.num_failures - 2)))
        services.goodput.switch("restart")

    def _pause(self, seconds: float) -> None:
        services = self._services
        end_s = services.clock() + seconds
        while services.clock() < end_s and services.request is None:
            services.sleep(PAUSE_STEP_S)
            services.look_for_requests()

    def _save(self, progress: _Progress, *, is_end: bool) -> None:
        """Makes the state durable, unless it is; returns when that is settled."""
        services, base = self._services, progress.base
        services.goodput.switch("ckpt_stall")
        self._settle_save(progress.number)
        if base.state is None or services.checkpoints.last_durable == base.step:
            services.goodput.switch("idle")
            return
        assert base.layout is not None
        services.checkpoints.begin_save(
            base.step, base.layout, base.state, {"generation": progress.number}
        )
        is_saved = self._settle_save(progress.number)
        services.goodput.switch("idle")
        if is_end and not is_saved:
            raise RunError(
                f"the last checkpoint, of step {base.step}, could not be saved; the newest durable "
                f"one is of step {services.checkpoints.last_durable}. Make room for "
                f"{services.folder.checkpoints}, then start the same command again"
            )

    def _settle_save(self, number: int) -> bool:
        outcome = self._services.checkpoints.poll(wait=True)
        if outcome is None:
            return True
        if outcome.error is not None:
            tell_failed_save(self._services, outcome.step, outcome.error, number)
            return False
        self._services.ledger.note(kind="checkpoint", generation=number, next_step=outcome.step)
        return True
