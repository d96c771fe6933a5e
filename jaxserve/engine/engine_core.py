"""EngineCore: the loop in a thread of its own, and the door to it for all others.

What a request must be, and what becomes of one, is said by the engines that
build on it: `Engine` generates text, `EncoderEngine` makes embeddings.
"""

from __future__ import annotations

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from jaxserve.engine.failure_log import log_failure
from jaxserve.engine.inbox import Arrival, Errand, Inbox
from jaxserve.engine.loop import (
    Committed,
    EngineLoop,
    Outputs,
    PendingMasks,
    StepExecutor,
    StepScheduler,
)
from jaxserve.engine.memory_recovery import MemoryRecovery
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.output import OutputSink
from jaxserve.engine.request import FinishReason, GenerationRequest, Request
from jaxserve.errors import ConfigError

logger = logging.getLogger(__name__)

# A step that is running must come to its end before a request can be cut short
# and before the thread can end. A device that takes longer than this hangs.
STEP_END_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine's state at a glance, for load reports and health checks."""

    accepting: bool
    failed: bool
    """The device or the scheduler failed; only a restart helps."""
    num_running: int
    num_waiting: int
    """In the queue, requests that were preempted included."""
    num_waiting_tokens: int
    num_steps: int
    last_step_age_s: float | None
    """Since the last step completed; None before the first one. Large after
    an idle time too."""
    step_in_flight_s: float | None
    """How long the device has been at the step it works on; None when it has
    none. Large means that it hangs."""
    stalled_s: float | None
    """How long there has been work and no step of it has ended; None without work."""
    is_recovering: bool
    """The device had no memory for the last step, and there is work to do again."""
    num_steps_out_of_memory: int
    mean_step_fill: float
    """Rows that carried a token, over rows computed; 0 before the first step."""
    compiles_after_ready: int
    num_pages_free: int = 0
    """This and what follows stay 0 in an encoder, which keeps no keys and values."""
    num_pages_cached: int = 0
    """Kept for the prefix cache alone: a new request can get these too."""
    num_pages_total: int = 0
    num_preemptions: int = 0
    num_drafts: int = 0
    """Of speculative decoding: drafts that were checked, ..."""
    num_draft_tokens: int = 0
    """...their tokens, and of these..."""
    num_accepted_tokens: int = 0
    """...those that came out."""
    prefix_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache, and of these..."""
    prefix_cache_hits: int = 0
    """...those that were found."""


class EngineCore(ABC):
    """Serves requests from any thread until it is stopped.

    Args:
        scheduler, executor, outputs, metrics: of one kind; the loop's thread owns them.
        max_queued_requests, max_queued_tokens: bounds of the queue.
        clock: the engine's, in seconds.
        count_compiles: returns the compilations since the engine was ready.
        masks: of constrained requests, where there can be some.
        recovery: None: a step without memory is a failure of the engine.
    """

    def __init__(
        self,
        scheduler: StepScheduler,
        executor: StepExecutor,
        outputs: Outputs,
        metrics: EngineMetrics,
        *,
        max_queued_requests: int,
        max_queued_tokens: int,
        clock: Callable[[], float],
        count_compiles: Callable[[], int],
        masks: PendingMasks | None = None,
        recovery: MemoryRecovery | None = None,
    ) -> None:
        self.metrics = metrics
        self._scheduler = scheduler
        self._clock = clock
        self._count_compiles = count_compiles
        self._inbox = Inbox(
            max_queued_requests=max_queued_requests, max_queued_tokens=max_queued_tokens
        )
        self._loop = EngineLoop(
            scheduler, executor, self._inbox, outputs, metrics, clock, masks, recovery
        )
        self._recovery = recovery
        self._entry: AbstractContextManager[Any] = nullcontext()
        """Held from when a request's record is made until the request is live."""
        self._failed = False
        # Daemon: a process that forgets to stop the engine can still end.
        self._thread = threading.Thread(target=self._run, name="jaxserve-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @abstractmethod
    def validate(self, request: GenerationRequest) -> None:
        """Raises InvalidRequest naming the field, unless it can be served."""

    @abstractmethod
    def _record(self, request: GenerationRequest) -> Request:
        """The scheduler's record of a request that is valid."""

    def add(self, request: GenerationRequest, sink: OutputSink) -> Request:
        """Takes a request; its outputs go to `sink`, the last one with a reason.

        Returns the engine's record of it, for `cancel`. Raises InvalidRequest,
        QueueFull or NotAccepting; then no output comes.
        """
        self.validate(request)
        with self._entry:
            record = self._record(request)
            self._inbox.put(Arrival(record, sink))
        return record

    def check_room(self) -> None:
        """Raises QueueFull or NotAccepting if any request would be refused now."""
        self._inbox.check_room()

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> bool:
        """Ends whichever request has this id, within one step. False if none
        is running. Who added the request calls `cancel`."""
        return self._inbox.end(request_id, reason)

    def cancel(self, request: Request) -> bool:
        """Ends what `add` returned, within one step, and never another request
        that has got its id since. False if it has ended already."""
        return self._inbox.end_request(request, FinishReason.CANCELLED)

    def run_between_requests(self, action: Callable[[], None]) -> Future[None]:
        """Runs `action` in the engine's thread, between two steps, when every request that has
        begun is over; those that have not wait for it.

        Returns at once. The future has what `action` raises, or NotAccepting if the engine is
        stopped first; until it runs it can be cancelled. Raises NotAccepting.
        """
        errand = Errand(action, Future())
        self._inbox.send(errand)
        return errand.done

    def run_between_steps(self, action: Callable[[], None]) -> Future[None]:
        """The same, but without waiting for requests, whose steps go on after it."""
        errand = Errand(action, Future(), waits=False)
        self._inbox.send(errand)
        return errand.done

    def drain(self, timeout_s: float, before_cut: Callable[[], object] | None = None) -> bool:
        """Takes no more requests and waits until all have ended.

        Those left after `timeout_s` are cancelled, once `before_cut` was called, and the answer
        is False.
        """
        self._inbox.refuse("the engine is shutting down: send the request elsewhere")
        if self._inbox.wait_until_none_live(timeout_s):
            return True
        if before_cut is not None:
            before_cut()
        self._inbox.end_all(FinishReason.CANCELLED)
        self._inbox.wait_until_none_live(STEP_END_TIMEOUT_S)
        return False

    def stop(self, timeout_s: float = STEP_END_TIMEOUT_S) -> bool:
        """Cancels what runs and ends the thread. Can be called twice.

        False if the thread has not ended after `timeout_s`: the device hangs,
        and a process that ends in the usual way may wait for it or crash.
        """
        self._inbox.refuse("the engine has stopped: send the request elsewhere")
        self._inbox.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def fail(self, why: str) -> None:
        """No step will come to its end any more: takes no more requests, whose senders are told
        `why`. May be called from any thread; requests that run are left alone, since their
        thread may wait for the device for ever.
        """
        self._failed = True
        self._inbox.refuse(why)

    def share_cache(self, shares: Mapping[str, float]) -> None:
        """From now on each owner of cached prefixes keeps its part of the KV cache.

        May be called from any thread. Raises ConfigError if the parts leave too little to work
        with.
        """
        if shares:
            raise ConfigError(
                "cache_share: an encoder keeps no keys and values: leave it out of the keys file"
            )

    def snapshot(self) -> EngineSnapshot:
        """May be called from any thread; the figures may be a step apart."""
        num_queued, num_queued_tokens = self._inbox.num_queued
        metrics = self.metrics
        last_step_s, num_steps = metrics.last_step_s, metrics.num_steps
        now_s, recovery = self._clock(), self._recovery
        is_recovering = recovery is not None and recovery.num_in_a_row > 0
        return EngineSnapshot(
            accepting=self._inbox.accepting,
            failed=self._failed,
            num_running=self._scheduler.num_running,
            num_waiting=num_queued,
            num_waiting_tokens=num_queued_tokens,
            num_steps=num_steps,
            last_step_age_s=None if last_step_s is None else now_s - last_step_s,
            step_in_flight_s=self._loop.step_in_flight_s(now_s),
            stalled_s=self._loop.stalled_s(now_s),
            is_recovering=is_recovering and self._scheduler.has_work,
            num_steps_out_of_memory=0 if recovery is None else recovery.num_failures,
            mean_step_fill=metrics.num_step_tokens / max(1, metrics.num_step_rows),
            compiles_after_ready=self._count_compiles(),
        )

    def _run(self) -> None:
        try:
            committed: Committed | None = None
            while not self._inbox.stopping:
                self._loop.wait_for_work()
                committed = self._loop.turn(committed)
            self._loop.emit(committed)
            self._loop.end_all(FinishReason.CANCELLED)
            self._loop.finish_in_flight()
        except Exception as error:
            log_failure(logger, "the engine failed and takes no more requests", error)
            if not self._failed:
                self.fail("the engine has failed: restart it; the log says why")
            self._loop.fail_all()
