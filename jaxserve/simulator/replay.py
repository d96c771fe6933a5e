"""Replay: a live engine's steps again, in virtual time, with the same plans.

A recording holds what the loop cannot know by itself: which mail it took after
how many completed steps, and each step's results and duration. Fed to the
simulator, the same scheduler must make the same plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.engine.inbox import Arrival, Mail
from jaxserve.engine.loop import Arrivals, Committed, EngineLoop, Outputs
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.plan import StepPlan, StepResults
from jaxserve.engine.request import FinishReason, Request, RequestOutput
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.engine.step_log import CompletedStep
from jaxserve.simulator.clock import VirtualClock
from jaxserve.simulator.sim_executor import SimExecutor

_NO_MAIL = Mail((), ())


@dataclass(frozen=True, slots=True)
class TakenMail:
    """Mail that the loop took at one turn. Requests are as they arrived."""

    num_completed: int
    """Steps that had completed by then."""
    requests: tuple[Request, ...]
    ends: tuple[tuple[str, FinishReason], ...]


@dataclass(slots=True)
class Recording:
    """What happened in a live engine."""

    mails: list[TakenMail] = field(default_factory=list)
    steps: list[CompletedStep] = field(default_factory=list)


class RecordedArrivals:
    """The loop's arrivals, which remember what was taken when.

    `recording.steps` has to be filled as steps complete (`ObservedExecutor`).
    Raises ValueError for a request with a deadline: it ends by the clock, which
    is another one in a replay. And for one with a constraint, whose masks come
    at their own time.
    """

    def __init__(self, arrivals: Arrivals, recording: Recording) -> None:
        self._arrivals = arrivals
        self._recording = recording

    def take(self) -> Mail:
        mail = self._arrivals.take()
        if mail.arrivals or mail.ends:
            requests = tuple(_as_arrived(arrival.request) for arrival in mail.arrivals)
            if any(request.generation.deadline_s is not None for request in requests):
                raise ValueError("a request with a deadline cannot be recorded for replay")
            if any(arrival.request.masks is not None for arrival in mail.arrivals):
                raise ValueError("a constrained request cannot be recorded for replay")
            num_completed = len(self._recording.steps)
            self._recording.mails.append(TakenMail(num_completed, requests, mail.ends))
        return mail

    def wait(self, timeout_s: float | None) -> bool:
        return self._arrivals.wait(timeout_s)

    def wait_for_step(self) -> bool:
        return self._arrivals.wait_for_step()

    def publish_waiting(self, num_requests: int, num_tokens: int) -> None:
        self._arrivals.publish_waiting(num_requests, num_tokens)

    def release(self, request_ids: Sequence[str]) -> None:
        self._arrivals.release(request_ids)

    def delivered(self) -> None:
        self._arrivals.delivered()


class ReplayDiverged(RuntimeError):
    """The replay planned a step that the recording does not have."""


def replay(recording: Recording, scheduler: Scheduler, outputs: Outputs) -> list[StepPlan]:
    """Runs a recording through a new scheduler; the plans that it makes.

    Args:
        scheduler: of the recorded engine's configuration and policy, unused.
        outputs: what ends requests at stop strings, as in the engine; a
            `Stopwatch` does where there were none and nothing was cancelled.

    Raises ReplayDiverged if it wants another step than was recorded. Budgets
    and policies that look at the clock may diverge: host time is not replayed.
    """
    clock = VirtualClock()
    by_id = {step.plan.step_id: step for step in recording.steps}

    def recorded(plan: StepPlan) -> CompletedStep:
        step = by_id.get(plan.step_id)
        if step is None:
            raise ReplayDiverged(f"step {plan.step_id} was not recorded")
        return step

    def results_of(plan: StepPlan) -> StepResults:
        return recorded(plan).results

    executor = SimExecutor(
        clock,
        lambda plan: (recorded(plan).duration_s, 0.0),
        depth=scheduler.config.max_in_flight,
        results_of=results_of,
        record_steps=True,
    )
    source = _RecordedSource(recording.mails)
    loop = EngineLoop(scheduler, executor, source, outputs, EngineMetrics(), clock)
    committed: Committed | None = None
    while source.num_completed < len(recording.steps):
        loop.wait_for_work()
        committed = loop.turn(committed)
        source.num_completed += committed is not None
    assert executor.stats.steps is not None
    return [step.plan for step in executor.stats.steps]


def plan_bytes(plan: StepPlan) -> bytes:
    """Every field of a plan, as text; equal plans give equal bytes."""
    return repr(plan).encode()


class _DiscardSink:
    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        """Nobody reads a replay."""


class _RecordedSource:
    """Gives each mail after as many completed steps as in the recording."""

    def __init__(self, mails: Sequence[TakenMail]) -> None:
        self.num_completed = 0
        self._mails = mails
        self._next = 0
        self._sink = _DiscardSink()

    def take(self) -> Mail:
        if self._next == len(self._mails):
            return _NO_MAIL
        mail = self._mails[self._next]
        if mail.num_completed > self.num_completed:
            return _NO_MAIL
        self._next += 1
        arrivals = tuple(Arrival(_as_arrived(request), self._sink) for request in mail.requests)
        return Mail(arrivals, mail.ends)

    def wait(self, timeout_s: float | None) -> bool:  # noqa: ARG002  time moves with steps
        if self._next == len(self._mails):
            raise ReplayDiverged("work is left that the recording does not plan")
        return True

    def wait_for_step(self) -> bool:
        return True

    def publish_waiting(self, num_requests: int, num_tokens: int) -> None:
        """Nobody reads it here."""

    def release(self, request_ids: Sequence[str]) -> None:
        """Ids are free again at once."""

    def delivered(self) -> None:
        """Nobody waits for it."""


def _as_arrived(request: Request) -> Request:
    """A record without anything that the engine did since."""
    return Request(
        generation=request.generation,
        max_tokens=request.max_tokens,
        seed=request.seed,
        stop_token_ids=request.stop_token_ids,
        arrival_s=request.arrival_s,
    )
