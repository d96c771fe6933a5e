"""The engine's loop: ingest, plan, submit, complete, commit, emit.

It has no thread and no clock of its own, so that one loop drives a device in
real time and a simulated one in virtual time. The step that is committed but
not yet emitted is a value carried from turn to turn: a turn gives the device
its next step before it spends time on text.
"""

from __future__ import annotations

import heapq
import logging
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jaxserve.engine.executor import StepOutOfMemory
from jaxserve.engine.failure_log import log_failure
from jaxserve.engine.inbox import Arrival, Errand, Mail
from jaxserve.engine.metrics import EngineMetrics, StepRecord
from jaxserve.engine.output import Addressed, OutputSink
from jaxserve.engine.request import FinishReason, Request
from jaxserve.errors import NotAccepting, QueueFull

logger = logging.getLogger(__name__)

_INTEGRITY_CHECK_AFTER_IDLE_S = 1.0
_MASK_PATIENCE = 0.25
"""Of the last step's time: how long a plan waits for masks while the device has another step."""


class Arrivals(Protocol):
    """Where requests come from: the engine's `Inbox`, or a trace."""

    def take(self) -> Mail: ...
    def wait(self, timeout_s: float | None) -> bool: ...
    def wait_for_step(self) -> bool:
        """False if there is mail that should be looked at before the step in
        flight is waited for; True (at once) if that wait comes first."""
        ...

    def publish_waiting(self, num_requests: int, num_tokens: int) -> None: ...
    def release(self, request_ids: Sequence[str]) -> None: ...
    def delivered(self) -> None: ...


class Planned(Protocol):
    """What the loop reads of a plan."""

    @property
    def step_id(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def num_rows_bucket(self) -> int: ...


class Update(Protocol):
    """What the loop reads of what a step did to a request."""

    @property
    def request(self) -> Request: ...
    @property
    def finish_reason(self) -> FinishReason | None: ...


class StepScheduler(Protocol):
    """What the loop asks of a scheduler. Plans, results and updates are matters of the
    scheduler, the executor and the outputs: the loop carries them from one to the next."""

    @property
    def has_work(self) -> bool: ...
    @property
    def num_running(self) -> int: ...
    @property
    def num_waiting(self) -> int: ...
    @property
    def num_waiting_tokens(self) -> int: ...
    def add(self, request: Request) -> None: ...
    def plan(self, now_s: float) -> Planned | None: ...
    def commit(self, plan: Any, results: Any, now_s: float) -> Iterable[Update]: ...
    def finish(self, request_id: str, reason: FinishReason) -> Request | None: ...
    def check_integrity(self) -> None: ...


class StepExecutor(Protocol):
    """`Executor`, for plans of any kind."""

    def can_accept(self) -> bool: ...
    def submit(self, plan: Any) -> None: ...
    def next_completion(self) -> tuple[Any, Any]: ...


class PendingMasks(Protocol):
    """Masks of constrained requests that are computed beside the steps."""

    @property
    def num_pending(self) -> int: ...
    def start_batch(self) -> None:
        """The tokens of the step that was committed are complete."""
        ...

    def wait(self, timeout_s: float) -> bool: ...


class Recovery(Protocol):
    """What is done when the device had no memory for a step: `MemoryRecovery`."""

    def note_step(self) -> None: ...
    def recover(self) -> Sequence[Request]: ...


class Outputs(Protocol):
    """What becomes of tokens: the engine's `OutputProcessor`, or a stopwatch."""

    @property
    def num_open(self) -> int: ...
    def open_ids(self) -> Sequence[str]: ...
    def has(self, request_id: str) -> bool: ...
    def is_open(self, request: Request) -> bool: ...
    def open(self, request: Request, sink: OutputSink) -> None: ...
    def update(self, update: Any, now_s: float) -> Addressed | None: ...
    def end(self, request_id: str, reason: FinishReason, now_s: float) -> Addressed | None: ...


@dataclass(frozen=True, slots=True)
class Committed:
    """A committed step whose outputs have not been emitted."""

    updates: Iterable[Update]
    completed_s: float


@dataclass(frozen=True, slots=True)
class _InFlight:
    plan: Planned
    submitted_s: float
    host_gap_s: float


class EngineLoop:
    """One `turn` at a time; `wait_for_work` when a turn can do nothing.

    Not thread-safe: one thread calls it. An exception out of `turn` is a
    failure of the executor or the scheduler, after which only `fail_all` may
    be called; one about a single request ends that request as ERROR.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        executor: StepExecutor,
        arrivals: Arrivals,
        outputs: Outputs,
        metrics: EngineMetrics,
        clock: Callable[[], float],
        masks: PendingMasks | None = None,
        recovery: Recovery | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._arrivals = arrivals
        self._masks = masks
        self._recovery = recovery
        self._outputs = outputs
        self._metrics = metrics
        self._clock = clock
        self._in_flight: deque[_InFlight] = deque()
        self._deadlines: list[tuple[float, int, Request]] = []
        self._num_deadlines_seen = 0
        self._backlog: deque[Request] = deque()
        """Arrivals that the scheduler's queue has no room for, since requests
        were preempted into it after these had been accepted."""
        self._errands: deque[Errand] = deque()
        """While there are any, no request begins; they run when those that have begun are over."""
        self._ends: list[tuple[str, FinishReason]] = []
        """Ended at the scheduler; their last output comes with the next emit."""
        self._can_plan = True
        """False after a plan of None, until something happens."""
        self._device_idle_since_s = clock()
        self._last_completed_s = self._device_idle_since_s
        self._woken_s = self._device_idle_since_s
        """When work came after an idle time."""
        self._last_step_s = 0.0

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def step_in_flight_s(self, now_s: float) -> float | None:
        """How long the device has been at its oldest step; None when it has
        none. May be called from any thread."""
        try:
            submitted_s = self._in_flight[0].submitted_s
        except IndexError:
            return None
        # A step that was submitted early began when the one before it ended.
        return now_s - max(submitted_s, self._last_completed_s)

    def stalled_s(self, now_s: float) -> float | None:
        """How long there has been work and no step has ended; None without work. More than a
        step in flight: it shows a loop that hangs itself, too. From any thread."""
        if not self._scheduler.has_work:
            return None
        return now_s - max(self._last_completed_s, self._woken_s)

    def turn(self, committed: Committed | None) -> Committed | None:
        """Feeds the device, emits `committed`, and returns the next committed
        step; None when nothing is in flight, or when mail came first."""
        self._ingest()
        if self._masks is not None and self._masks.num_pending and self._in_flight:
            # The device has work: rows that get their mask by now don't miss the next step.
            self.emit(committed)
            committed = None
            self._masks.wait(_MASK_PATIENCE * self._last_step_s)
        self._feed_device()
        self.emit(committed)
        if not self._in_flight or not self._arrivals.wait_for_step():
            return None
        try:
            return self._complete()
        except StepOutOfMemory as error:
            self._recover(error)
            return None

    def wait_for_work(self) -> None:
        """Blocks while a turn could do nothing, at most until a deadline."""
        if self._in_flight or self._can_plan:
            return
        if not self._scheduler.has_work:
            if not self._arrivals.wait(_INTEGRITY_CHECK_AFTER_IDLE_S):
                self._scheduler.check_integrity()
                self._arrivals.wait(None)
            self._woken_s = self._clock()
        else:
            next_s = self._deadlines[0][0] if self._deadlines else None
            self._arrivals.wait(None if next_s is None else max(0.0, next_s - self._clock()))
        self._can_plan = True
        self._device_idle_since_s = self._clock()

    def finish_in_flight(self) -> None:
        """Waits for the steps in flight, so that no page stays held by them."""
        while self._in_flight:
            try:
                self._complete()
            except StepOutOfMemory as error:
                self._recover(error)

    def end_all(self, reason: FinishReason) -> None:
        """Ends every open request, and those that have not been ingested."""
        self._ingest()
        self._refuse_errands()
        for request_id in self._outputs.open_ids():
            self._end(request_id, reason)
        self.emit(None)

    def fail_all(self) -> None:
        """Ends every request as ERROR, without the scheduler and the executor:
        one of the two has failed."""
        mail = self._arrivals.take()
        self._errands.extend(mail.errands)
        self._refuse_errands()
        for arrival in mail.arrivals:
            self._outputs.open(arrival.request, arrival.sink)
        self._in_flight.clear()
        self._ends = [(request_id, FinishReason.ERROR) for request_id in self._outputs.open_ids()]
        self.emit(None)

    def emit(self, committed: Committed | None) -> None:
        """Turns updates and ends into outputs; one delivery a sink."""
        addressed = []
        if committed is not None:
            addressed = [
                self._output_of(update, committed.completed_s) for update in committed.updates
            ]
        ends, self._ends = self._ends, []
        addressed += [self._last_output_of(request_id, reason) for request_id, reason in ends]
        self._deliver([a for a in addressed if a is not None])

    def _deliver(self, addressed: Sequence[Addressed]) -> None:
        by_sink: dict[int, list[Addressed]] = {}
        for one in addressed:
            by_sink.setdefault(id(one.sink), []).append(one)
        finished = [
            one.output.request_id for one in addressed if one.output.finish_reason is not None
        ]
        if finished:
            self._arrivals.release(finished)
        for batch in by_sink.values():
            outputs = [one.output for one in batch]
            try:
                batch[0].sink.deliver(outputs)
            except Exception as error:
                log_failure(logger, "an output sink failed; its requests are cancelled", error)
                for output in outputs:
                    if output.finish_reason is None:
                        self._end(output.request_id, FinishReason.CANCELLED)
        if finished:
            self._arrivals.delivered()

    def _ingest(self) -> None:
        mail = self._arrivals.take()
        for errand in mail.errands:
            if errand.waits:
                self._errands.append(errand)
            else:
                _run(errand)
        for arrival in mail.arrivals:
            self._accept(arrival)
        self._run_errands()
        self._schedule_backlog()
        for request_id, reason in mail.ends:
            if self._outputs.has(request_id):
                self._end(request_id, reason)
        now_s = self._clock()
        while self._deadlines and self._deadlines[0][0] <= now_s:
            _, _, request = heapq.heappop(self._deadlines)
            if self._outputs.is_open(request):
                self._end(request.request_id, FinishReason.DEADLINE)

    def _accept(self, arrival: Arrival) -> None:
        request = arrival.request
        self._outputs.open(request, arrival.sink)
        self._backlog.append(request)
        deadline_s = request.generation.deadline_s
        if deadline_s is not None:
            self._num_deadlines_seen += 1
            heapq.heappush(self._deadlines, (deadline_s, self._num_deadlines_seen, request))
            self._forget_old_deadlines()

    def _schedule_backlog(self) -> None:
        while self._backlog and not self._errands:
            request = self._backlog[0]
            try:
                self._scheduler.add(request)
            except QueueFull:
                return
            except Exception:
                logger.exception("request %r could not be scheduled", request.request_id)
                self._end(request.request_id, FinishReason.ERROR)
                continue
            self._backlog.popleft()
            self._can_plan = True

    def _run_errands(self) -> None:
        self._errands = deque(errand for errand in self._errands if not errand.done.cancelled())
        while self._errands and not self._scheduler.has_work and not self._in_flight:
            _run(self._errands.popleft())

    def _refuse_errands(self) -> None:
        while self._errands:
            errand = self._errands.popleft()
            if errand.done.set_running_or_notify_cancel():
                errand.done.set_exception(NotAccepting("the engine has stopped"))

    def _forget_old_deadlines(self) -> None:
        # Requests that ended in time leave theirs behind.
        if len(self._deadlines) > 2 * self._outputs.num_open + 64:
            self._deadlines = [d for d in self._deadlines if self._outputs.is_open(d[2])]
            heapq.heapify(self._deadlines)

    def _end(self, request_id: str, reason: FinishReason) -> None:
        if self._scheduler.finish(request_id, reason) is None:
            self._backlog = deque(r for r in self._backlog if r.request_id != request_id)
        self._ends.append((request_id, reason))
        self._can_plan = True

    def _feed_device(self) -> None:
        while self._can_plan and self._executor.can_accept():
            plan = self._scheduler.plan(self._clock())
            if plan is None:
                self._can_plan = False
                break
            now_s = self._clock()
            host_gap_s = 0.0 if self._in_flight else now_s - self._device_idle_since_s
            # Before the call: a device that hangs may do so in there.
            self._in_flight.append(_InFlight(plan, now_s, host_gap_s))
            try:
                self._executor.submit(plan)
            except StepOutOfMemory as error:
                self._recover(error)
        self._arrivals.publish_waiting(
            self._scheduler.num_waiting + len(self._backlog),
            self._scheduler.num_waiting_tokens
            + sum(request.num_prompt_tokens for request in self._backlog),
        )

    def _recover(self, error: StepOutOfMemory) -> None:
        if self._recovery is None:
            raise error
        self._in_flight.clear()
        for request in self._recovery.recover():
            self._end(request.request_id, FinishReason.ERROR)
        self._can_plan = True
        self._device_idle_since_s = self._clock()

    def _complete(self) -> Committed:
        waited_from_s = self._clock()
        plan, results = self._executor.next_completion()
        now_s = self._clock()
        step = self._in_flight[0]
        started_s = max(step.submitted_s, self._last_completed_s)
        # In this order, other threads never see the next step without its start.
        self._last_completed_s = self._device_idle_since_s = now_s
        self._in_flight.popleft()
        self._can_plan = True
        self._last_step_s = now_s - started_s
        updates = self._scheduler.commit(plan, results, now_s)
        if self._recovery is not None:
            self._recovery.note_step()
        if self._masks is not None:
            self._masks.start_batch()
        self._metrics.observe_step(
            StepRecord(
                step_id=plan.step_id,
                completed_s=now_s,
                step_s=self._last_step_s,
                host_gap_s=step.host_gap_s,
                device_wait_s=now_s - waited_from_s,
                num_tokens=plan.num_tokens,
                num_rows_bucket=plan.num_rows_bucket,
            )
        )
        return Committed(updates, now_s)

    def _output_of(self, update: Update, now_s: float) -> Addressed | None:
        request_id = update.request.request_id
        try:
            addressed = self._outputs.update(update, now_s)
        except Exception as error:
            log_failure(logger, f"request {request_id!r} failed on the output side", error)
            self._end(request_id, FinishReason.ERROR)
            return None
        if addressed is None or addressed.output.finish_reason is None:
            return addressed
        if update.finish_reason is None:  # A stop string, which the scheduler cannot see.
            self._scheduler.finish(request_id, addressed.output.finish_reason)
            self._can_plan = True
        return addressed

    def _last_output_of(self, request_id: str, reason: FinishReason) -> Addressed | None:
        now_s = self._clock()
        try:
            return self._outputs.end(request_id, reason, now_s)
        except Exception as error:
            log_failure(logger, f"request {request_id!r} failed on the output side", error)
            return self._outputs.end(request_id, FinishReason.ERROR, now_s)


def _run(errand: Errand) -> None:
    """Unless it was cancelled. Whoever sent it hears of an error; requests go on."""
    if not errand.done.set_running_or_notify_cancel():
        return
    try:
        errand.run()
    except Exception as error:
        errand.done.set_exception(error)
    else:
        errand.done.set_result(None)
