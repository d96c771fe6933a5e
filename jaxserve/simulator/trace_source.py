"""TraceSource: requests that arrive at given times of the virtual clock."""

from __future__ import annotations

from collections.abc import Sequence

from jaxserve.engine.inbox import Arrival, Mail
from jaxserve.engine.output import OutputSink
from jaxserve.engine.request import Request, RequestOutput
from jaxserve.simulator.clock import VirtualClock
from jaxserve.simulator.sim_executor import SimExecutor

_NO_MAIL = Mail((), ())


class SimulationStuck(RuntimeError):
    """Requests wait, but nothing runs and nothing more arrives."""


class NoSink(OutputSink):
    """Simulated requests have no reader."""

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        raise AssertionError(f"nobody asked for outputs of {outputs[0].request_id}")


class TraceSource:
    """The engine loop's `Arrivals`, from a list sorted by `arrival_s`.

    Waiting moves the clock. An arrival comes before the step in flight if the
    executor has room for another step: an idle first pipeline stage takes it.
    """

    def __init__(
        self, requests: Sequence[Request], clock: VirtualClock, executor: SimExecutor
    ) -> None:
        self._requests = requests
        self._clock = clock
        self._executor = executor
        self._sink = NoSink()
        self._next = 0

    @property
    def exhausted(self) -> bool:
        return self._next == len(self._requests)

    def take(self) -> Mail:
        requests, now_s, first = self._requests, self._clock.now_s, self._next
        while self._next < len(requests) and requests[self._next].arrival_s <= now_s:
            self._next += 1
        if self._next == first:
            return _NO_MAIL
        return Mail(tuple(Arrival(r, self._sink) for r in requests[first : self._next]), ())

    def wait(self, timeout_s: float | None) -> bool:  # noqa: ARG002  nothing to do meanwhile
        if self.exhausted:
            raise SimulationStuck("requests wait that no step can hold, and no more arrive")
        self._clock.advance_to(self._requests[self._next].arrival_s)
        return True

    def wait_for_step(self) -> bool:
        if self.exhausted or not self._executor.can_accept():
            return True
        next_s = self._requests[self._next].arrival_s
        completion_s = self._executor.next_completion_s
        if completion_s is None or completion_s <= next_s:
            return True
        self._clock.advance_to(next_s)
        return False

    def publish_waiting(self, num_requests: int, num_tokens: int) -> None:
        """Nobody reads it here."""

    def release(self, request_ids: Sequence[str]) -> None:
        """Ids are never used twice here."""

    def delivered(self) -> None:
        """Nothing is ever delivered here."""
