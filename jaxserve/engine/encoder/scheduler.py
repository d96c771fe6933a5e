"""EncoderScheduler: whole texts into steps, the oldest first.

Pure Python; reads no clock and imports no jax. A text is done in one step, so
there are no pages, no slots and no preemption.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.engine.encoder.plan import (
    EncodeBucket,
    EncodePlan,
    EncodeResults,
    EncodeText,
    EncodeUpdate,
)
from jaxserve.engine.request import FinishReason, Request
from jaxserve.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class _InFlight:
    plan: EncodePlan
    requests: tuple[Request, ...]


class EncoderScheduler:
    """Plans steps for one executor. Not thread-safe: one thread calls it.

    Args:
        buckets: the compiled steps.
        max_in_flight: plans in flight at once.
    """

    def __init__(self, buckets: Sequence[EncodeBucket], *, max_in_flight: int) -> None:
        self._capacities: dict[int, list[int]] = {}
        """Positions -> the numbers of texts that there is a step for, ascending."""
        for bucket in sorted(buckets, key=lambda bucket: (bucket.num_positions, bucket.num_texts)):
            self._capacities.setdefault(bucket.num_positions, []).append(bucket.num_texts)
        self._lengths = list(self._capacities)
        self._max_in_flight = max_in_flight
        self._waiting: dict[str, Request] = {}
        self._in_flight: deque[_InFlight] = deque()
        self._running: set[str] = set()
        self._num_waiting_tokens = 0
        self._next_step_id = 0

    @property
    def has_work(self) -> bool:
        """Something waits or is in flight."""
        return bool(self._waiting or self._in_flight)

    @property
    def num_running(self) -> int:
        """Texts of the steps in flight that have not been ended."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        return self._num_waiting_tokens

    def add(self, request: Request) -> None:
        """Queues a text. Raises InvalidRequest if its id is in use or no step is
        long enough; the queue is bounded by who lets requests in."""
        if request.request_id in self._waiting or request.request_id in self._running:
            raise InvalidRequest("request_id", f"{request.request_id!r} is in use")
        num_tokens = request.num_prompt_tokens
        if not 1 <= num_tokens <= self._lengths[-1]:
            raise InvalidRequest(
                "texts", f"{num_tokens} tokens don't fit a step of {self._lengths[-1]} positions"
            )
        self._waiting[request.request_id] = request
        self._num_waiting_tokens += num_tokens

    def plan(self, now_s: float) -> EncodePlan | None:
        """The next step, to be submitted before `plan` is called again.

        The oldest text decides how long the step's places are. Those of its
        length come along, and where they leave places free, shorter ones do:
        a step costs the same, however many of its places are taken.

        None: nothing can be planned until a commit or an arrival.
        """
        if not self._waiting or len(self._in_flight) >= self._max_in_flight:
            return None
        num_positions = self._positions_for(next(iter(self._waiting.values())))
        capacities = self._capacities[num_positions]
        requests = self._choose(num_positions, capacities[-1])
        num_texts = next(number for number in capacities if number >= len(requests))
        texts = []
        for request in requests:
            self._take(request.request_id)
            self._running.add(request.request_id)
            request.first_scheduled_s = now_s
            texts.append(EncodeText(request.request_id, request.generation.prompt_token_ids))
        bucket = EncodeBucket(num_texts, num_positions)
        plan = EncodePlan(self._next_step_id, bucket, tuple(texts))
        self._next_step_id += 1
        self._in_flight.append(_InFlight(plan, tuple(requests)))
        return plan

    def commit(self, plan: EncodePlan, results: EncodeResults, now_s: float) -> list[EncodeUpdate]:
        """Takes in the results of the oldest step in flight.

        Returns what is done, in the plan's order; nothing for requests that
        ended earlier. Raises ValueError if `plan` or `results` is not the
        oldest step's.
        """
        if not self._in_flight or self._in_flight[0].plan.step_id != plan.step_id:
            raise ValueError(f"step {plan.step_id} is not the oldest in flight")
        if results.step_id != plan.step_id or len(results.vectors) != len(plan.texts):
            raise ValueError(f"results of step {results.step_id} don't fit plan {plan.step_id}")
        updates = []
        requests = self._in_flight.popleft().requests
        for request, vector in zip(requests, results.vectors, strict=True):
            if request.finish_reason is not None:
                continue
            is_sound = bool(np.isfinite(vector).all())
            reason = FinishReason.STOP if is_sound else FinishReason.ERROR
            request.last_token_s = now_s
            request.finish_reason = reason
            self._running.remove(request.request_id)
            updates.append(EncodeUpdate(request, reason, vector if is_sound else None))
        return updates

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """Ends a request at any moment. Returns it, or None if it is not waiting or
        running. A step that computes it runs to its end; its vector is dropped."""
        request = self._take(request_id)
        if request is None and request_id in self._running:
            self._running.remove(request_id)
            request = next(
                request
                for step in self._in_flight
                for request in step.requests
                if request.request_id == request_id and request.finish_reason is None
            )
        if request is not None:
            request.finish_reason = reason
        return request

    def check_integrity(self) -> None:
        """Raises AssertionError unless what runs is what the steps in flight hold."""
        held = {
            request.request_id
            for step in self._in_flight
            for request in step.requests
            if request.finish_reason is None
        }
        num_tokens = sum(request.num_prompt_tokens for request in self._waiting.values())
        if held != self._running or num_tokens != self._num_waiting_tokens:
            raise AssertionError(
                f"{len(self._running)} texts run, but steps hold {len(held)}; "
                f"{self._num_waiting_tokens} tokens wait, but texts have {num_tokens}"
            )

    def _positions_for(self, request: Request) -> int:
        """The shortest step that a text fits."""
        return self._lengths[bisect_left(self._lengths, request.num_prompt_tokens)]

    def _choose(self, num_positions: int, num_texts: int) -> list[Request]:
        chosen: list[Request] = []
        shorter: list[Request] = []
        for request in self._waiting.values():
            if len(chosen) == num_texts:
                return chosen
            length = self._positions_for(request)
            if length == num_positions:
                chosen.append(request)
            elif length < num_positions and len(shorter) < num_texts:
                shorter.append(request)
        return chosen + shorter[: num_texts - len(chosen)]

    def _take(self, request_id: str) -> Request | None:
        """Out of the queue, if it is there."""
        request = self._waiting.pop(request_id, None)
        if request is not None:
            self._num_waiting_tokens -= request.num_prompt_tokens
        return request
