"""Inbox: how other threads reach the engine's loop, within bounds."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as WaitTimedOut
from dataclasses import dataclass

from jaxserve.engine.output import OutputSink
from jaxserve.engine.request import FinishReason, Request
from jaxserve.errors import InvalidRequest, NotAccepting, QueueFull


@dataclass(frozen=True, slots=True)
class Arrival:
    request: Request
    sink: OutputSink


@dataclass(frozen=True, slots=True)
class Errand:
    """Something to do in the engine's thread between two steps."""

    run: Callable[[], None]
    done: Future[None]
    waits: bool = True
    """Until no request runs; then none begins before it is done."""


def done_in_time(done: Future[None], timeout_s: float | None) -> bool:
    """Waits for an errand, and cancels it when the time is up. Raises what it raises.

    False: it has not run and never will.
    """
    try:
        done.result(timeout_s)
    except WaitTimedOut:
        if done.cancel():
            return False
        done.result()  # It ran at that very moment.
    return True


@dataclass(frozen=True, slots=True)
class Mail:
    """What came in since the loop last looked, arrivals before ends."""

    arrivals: tuple[Arrival, ...]
    ends: tuple[tuple[str, FinishReason], ...]
    """Requests to end, by id, from outside a step: those that have the id when
    the mail is taken. An end never outlives the request it was meant for."""
    errands: tuple[Errand, ...] = ()


class Inbox:
    """Thread-safe. A request is *live* from `put` until `release`.

    *Queued* requests are those here plus those that wait in the scheduler, as
    the loop last published; both bounds count them.
    """

    def __init__(self, *, max_queued_requests: int, max_queued_tokens: int) -> None:
        self._max_queued_requests = max_queued_requests
        self._max_queued_tokens = max_queued_tokens
        self._changed = threading.Condition()
        self._arrivals: list[Arrival] = []
        self._num_arrival_tokens = 0
        self._ends: list[tuple[str, FinishReason]] = []
        self._errands: list[Errand] = []
        self._live: dict[str, Request] = {}
        self._delivering = False
        self._woken = False
        self._num_waiting = 0
        self._num_waiting_tokens = 0
        self._refusal: str | None = None
        self._stopping = False

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def accepting(self) -> bool:
        return self._refusal is None

    @property
    def num_queued(self) -> tuple[int, int]:
        """Queued requests and their prompt tokens."""
        with self._changed:
            return (
                len(self._arrivals) + self._num_waiting,
                self._num_arrival_tokens + self._num_waiting_tokens,
            )

    def put(self, arrival: Arrival) -> None:
        """Raises NotAccepting, InvalidRequest (id in use) or QueueFull."""
        request = arrival.request
        with self._changed:
            if self._refusal is not None:
                raise NotAccepting(self._refusal)
            if request.request_id in self._live:
                raise InvalidRequest(
                    "request_id", "a request with this id is running: choose another id"
                )
            self._check_room(request.num_prompt_tokens)
            self._live[request.request_id] = request
            self._arrivals.append(arrival)
            self._num_arrival_tokens += request.num_prompt_tokens
            self._changed.notify_all()

    def check_room(self) -> None:
        """Raises NotAccepting, or QueueFull if not even the shortest prompt has room."""
        with self._changed:
            if self._refusal is not None:
                raise NotAccepting(self._refusal)
            self._check_room(1)

    def _check_room(self, num_prompt_tokens: int) -> None:
        num_requests = len(self._arrivals) + self._num_waiting
        num_tokens = self._num_arrival_tokens + self._num_waiting_tokens
        if num_requests >= self._max_queued_requests:
            raise QueueFull(
                f"{num_requests} requests wait already (--max-queued-requests "
                f"{self._max_queued_requests}): retry later"
            )
        # A long prompt may enter an empty queue whatever the bound.
        if num_requests and num_tokens + num_prompt_tokens > self._max_queued_tokens:
            raise QueueFull(
                f"{num_tokens} prompt tokens wait already (--max-queued-tokens "
                f"{self._max_queued_tokens}): retry later"
            )

    def end(self, request_id: str, reason: FinishReason) -> bool:
        """Asks for the end of whichever request has this id; False if none is
        live."""
        with self._changed:
            request = self._live.get(request_id)
            return request is not None and self._end_live(request, reason)

    def end_request(self, request: Request, reason: FinishReason) -> bool:
        """Asks for the end of this very request; False if it is not live, also
        when another one has got its id since."""
        with self._changed:
            is_live = self._live.get(request.request_id) is request
            return is_live and self._end_live(request, reason)

    def _end_live(self, request: Request, reason: FinishReason) -> bool:
        self._ends.append((request.request_id, reason))
        self._changed.notify_all()
        return True

    def end_all(self, reason: FinishReason) -> None:
        with self._changed:
            self._ends.extend((request_id, reason) for request_id in self._live)
            self._changed.notify_all()

    def live(self) -> tuple[Request, ...]:
        """The requests that are live."""
        with self._changed:
            return tuple(self._live.values())

    def send(self, errand: Errand) -> None:
        """Raises NotAccepting."""
        with self._changed:
            if self._refusal is not None:
                raise NotAccepting(self._refusal)
            self._errands.append(errand)
            self._changed.notify_all()

    def refuse(self, why: str) -> None:
        """From now on `put` and `send` raise NotAccepting with this message."""
        with self._changed:
            self._refusal = why

    def stop(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def take(self) -> Mail:
        """The loop takes what is here; arrivals count as waiting from now on."""
        if not (self._arrivals or self._ends or self._errands or self._woken):
            return _NO_MAIL
        with self._changed:
            self._woken = False
            mail = Mail(tuple(self._arrivals), tuple(self._ends), tuple(self._errands))
            self._num_waiting += len(self._arrivals)
            self._num_waiting_tokens += self._num_arrival_tokens
            self._arrivals.clear()
            self._num_arrival_tokens = 0
            self._ends.clear()
            self._errands.clear()
        return mail

    def publish_waiting(self, num_requests: int, num_tokens: int) -> None:
        """The loop tells how many requests and prompt tokens now wait in the
        scheduler. Called after what `take` gave has been handed to it."""
        with self._changed:
            self._num_waiting = num_requests
            self._num_waiting_tokens = num_tokens

    def wait(self, timeout_s: float | None) -> bool:
        """Blocks until mail, `wake` or a stop; False if the time ran out first."""
        with self._changed:
            return self._changed.wait_for(
                lambda: bool(
                    self._arrivals or self._ends or self._errands or self._woken or self._stopping
                ),
                timeout_s,
            )

    def wake(self) -> None:
        """The loop may be able to plan what it could not before."""
        with self._changed:
            self._woken = True
            self._changed.notify_all()

    def wait_for_step(self) -> bool:
        """Mail waits for the step in flight: there is nothing to wake the
        thread that waits for the device."""
        return True

    def release(self, request_ids: Sequence[str]) -> None:
        """The last outputs of these requests are about to be delivered; who
        gets one may use the id again at once."""
        with self._changed:
            for request_id in request_ids:
                self._live.pop(request_id, None)
            # These were meant for the request that has just ended.
            released = set(request_ids)
            self._ends = [end for end in self._ends if end[0] not in released]
            self._delivering = True

    def delivered(self) -> None:
        """What was released has been delivered."""
        with self._changed:
            self._delivering = False
            self._changed.notify_all()

    def wait_until_none_live(self, timeout_s: float) -> bool:
        """Blocks until every request has had its last output delivered."""
        with self._changed:
            return self._changed.wait_for(lambda: not (self._live or self._delivering), timeout_s)


_NO_MAIL = Mail((), ())
