"""The bounded queue of requests that have no slot."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from jaxserve.engine.request import Request
from jaxserve.errors import QueueFull


class WaitingQueue:
    """First come, first served within a class, lower classes first; preempted
    requests come back to the front of theirs.

    Bounds apply to new requests only, so that a preemption can never fail. A
    single request may exceed `max_tokens` if nothing else waits.
    """

    def __init__(self, max_requests: int, max_tokens: int) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._classes: dict[int, OrderedDict[str, Request]] = {}
        """By priority; a class without requests is not kept."""
        self.num_tokens = 0
        """Prompt tokens that wait."""

    def __len__(self) -> int:
        return sum(len(requests) for requests in self._classes.values())

    def __contains__(self, request_id: str) -> bool:
        return any(request_id in requests for requests in self._classes.values())

    def __iter__(self) -> Iterator[Request]:
        """In the order in which they become the head."""
        for priority in sorted(self._classes):
            yield from self._classes[priority].values()

    @property
    def head(self) -> Request | None:
        if not self._classes:
            return None
        return next(iter(self._classes[min(self._classes)].values()))

    def append(self, request: Request) -> None:
        """Raises QueueFull naming the limit that is reached."""
        if len(self) >= self._max_requests:
            raise QueueFull(
                f"{len(self)} requests wait already; retry later "
                "(the operator can raise --max-queued-requests)"
            )
        if self._classes and self.num_tokens + request.num_prompt_tokens > self._max_tokens:
            raise QueueFull(
                f"{self.num_tokens} prompt tokens wait already; retry later "
                "(the operator can raise --max-queued-tokens)"
            )
        self._insert(request)

    def push_front(self, request: Request) -> None:
        self._insert(request).move_to_end(request.request_id, last=False)

    def remove(self, request_id: str) -> Request | None:
        for priority, requests in self._classes.items():
            request = requests.pop(request_id, None)
            if request is not None:
                self.num_tokens -= request.num_prompt_tokens
                if not requests:
                    del self._classes[priority]
                return request
        return None

    def _insert(self, request: Request) -> OrderedDict[str, Request]:
        """Returns the class that it has joined, at the end."""
        requests = self._classes.setdefault(request.generation.priority, OrderedDict())
        requests[request.request_id] = request
        self.num_tokens += request.num_prompt_tokens
        return requests
