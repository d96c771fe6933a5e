"""Stopwatch: the engine loop's `Outputs` that keep times and no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from jaxserve.engine.output import Addressed, OutputSink
from jaxserve.engine.request import FinishReason, Request, TokenUpdate


@dataclass(slots=True)
class Timing:
    """One request's tokens on the clock."""

    request: Request
    token_s: list[float] = field(default_factory=list)
    """When each output token was committed."""

    @property
    def ttft_s(self) -> float:
        return self.token_s[0] - self.request.arrival_s

    @property
    def e2e_s(self) -> float:
        return self.token_s[-1] - self.request.arrival_s

    @property
    def queue_s(self) -> float:
        """Arrival to first scheduled."""
        scheduled_s = self.request.first_scheduled_s
        if scheduled_s is None:
            raise ValueError(f"{self.request.request_id} was never scheduled")
        return scheduled_s - self.request.arrival_s


class Stopwatch:
    """Keeps when each token came. A request ends by itself, never from outside.

    Args:
        stall_s: gaps between two tokens of a request above it are counted.
        late_s: requests scheduled later than that after arrival are counted.
    """

    def __init__(self, *, stall_s: float = float("inf"), late_s: float = float("inf")) -> None:
        self.num_stalls = 0
        self.num_late = 0
        self.finished: list[Timing] = []
        self._stall_s = stall_s
        self._late_s = late_s
        self._open: dict[str, Timing] = {}

    @property
    def num_open(self) -> int:
        return len(self._open)

    def started(self) -> list[Timing]:
        """Requests that have given tokens and are not finished."""
        return [timing for timing in self._open.values() if timing.token_s]

    def open_ids(self) -> Sequence[str]:
        return tuple(self._open)

    def has(self, request_id: str) -> bool:
        return request_id in self._open

    def is_open(self, request: Request) -> bool:
        timing = self._open.get(request.request_id)
        return timing is not None and timing.request is request

    def open(self, request: Request, sink: OutputSink) -> None:  # noqa: ARG002
        self._open[request.request_id] = Timing(request)

    def update(self, update: TokenUpdate, now_s: float) -> Addressed | None:
        timing = self._open[update.request.request_id]
        token_s = timing.token_s
        if token_s:
            if now_s - token_s[-1] > self._stall_s:
                self.num_stalls += 1
        elif timing.queue_s > self._late_s:
            self.num_late += 1
        token_s.append(now_s)
        if update.finish_reason is not None:
            self.finished.append(self._open.pop(update.request.request_id))
        return None

    def end(self, request_id: str, reason: FinishReason, now_s: float) -> Addressed | None:
        raise AssertionError(f"{request_id} ended as {reason} at {now_s} s from outside a step")
