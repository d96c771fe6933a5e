"""The bounded queue of requests that have no slot."""

from __future__ import annotations

from collections import OrderedDict

from jaxserve.engine.request import Request
from jaxserve.errors import QueueFull


class WaitingQueue:
    """First come, first served; preempted requests come back to the front.

    Bounds apply to new requests only, so that a preemption can never fail. A
    single request may exceed `max_tokens` if nothing else waits.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._requests: OrderedDict[str, Request] = OrderedDict()
        self.num_tokens = 0
        """Prompt tokens that wait."""

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    @property
    def head(self) -> Request | None:
        return next(iter(self._requests.values()), None)

    def append(self, request: Request) -> None:
        """Raises QueueFull naming the limit that is reached."""
        if len(self._requests) >= self._max_requests:
            raise QueueFull(
                f"{len(self._requests)} requests wait already; retry later "
                "(the operator can raise --max-queued-requests)"
            )
        if self._requests and self.num_tokens + request.num_prompt_tokens > self._max_tokens:
            raise QueueFull(
                f"{self.num_tokens} prompt tokens wait already; retry later "
                "(the operator can raise --max-queued-tokens)"
            )
        self._insert(request)

    def push_front(self, request: Request) -> None:
        self._insert(request)
        self._requests.move_to_end(request.request_id, last=False)

    def remove(self, request_id: str) -> Request | None:
        request = self._requests.pop(request_id, None)
        if request is not None:
            self.num_tokens -= request.num_prompt_tokens
        return request

    def _insert(self, request: Request) -> None:
        self._requests[request.request_id] = request
        self.num_tokens += request.num_prompt_tokens
