"""The bounded queue of requests that have no slot."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

from jaxserve.engine.request import Request
from jaxserve.errors import QueueFull

QueueKey = Callable[[Request], tuple[float, ...]]
"""Rank of a request within its class, smallest first."""


class _Entry(NamedTuple):
    priority: int
    key: tuple[float, ...]
    turn: int
    """Differs between any two entries, so that no two requests are compared."""
    request: Request


class WaitingQueue:
    """Lower classes first; within a class by `key`, then first come, first
    served. Preempted requests come back ahead of those with an equal key.

    Bounds apply to new requests only, so that a preemption can never fail. A
    single request may exceed `max_tokens` if nothing else waits.

    Args:
        max_requests, max_tokens: most requests, and prompt tokens of them.
        key: None makes all keys equal.
    """

    def __init__(self, max_requests: int, max_tokens: int, key: QueueKey | None = None) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._key = key
        self._entries: dict[str, _Entry] = {}
        self._heap: list[_Entry] = []
        """Every entry, and some that were taken out of `_entries` since."""
        self._num_turns = 0
        self.num_tokens = 0
        """Prompt tokens that wait."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    @property
    def head(self) -> Request | None:
        heap = self._heap
        while heap and self._entries.get(heap[0].request.request_id) is not heap[0]:
            heapq.heappop(heap)
        return heap[0].request if heap else None

    def append(self, request: Request) -> None:
        """Raises QueueFull naming the limit that is reached."""
        if len(self._entries) >= self._max_requests:
            raise QueueFull(
                f"{len(self._entries)} requests wait already; retry later "
                "(the operator can raise --max-queued-requests)"
            )
        if self._entries and self.num_tokens + request.num_prompt_tokens > self._max_tokens:
            raise QueueFull(
                f"{self.num_tokens} prompt tokens wait already; retry later "
                "(the operator can raise --max-queued-tokens)"
            )
        self._num_turns += 1
        self._insert(request, self._num_turns)

    def push_front(self, request: Request) -> None:
        self._num_turns += 1
        self._insert(request, -self._num_turns)

    def remove(self, request_id: str) -> Request | None:
        entry = self._entries.pop(request_id, None)
        if entry is None:
            return None
        self.num_tokens -= entry.request.num_prompt_tokens
        if len(self._heap) > 2 * len(self._entries) + 64:
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
        return entry.request

    def reorder(self, request: Request) -> None:
        """Moves a request that waits to where its key now says."""
        turn = self._entries[request.request_id].turn
        self.remove(request.request_id)
        self._insert(request, turn)

    def _insert(self, request: Request, turn: int) -> None:
        key = () if self._key is None else self._key(request)
        entry = _Entry(request.generation.priority, key, turn, request)
        self._entries[request.request_id] = entry
        heapq.heappush(self._heap, entry)
        self.num_tokens += request.num_prompt_tokens
