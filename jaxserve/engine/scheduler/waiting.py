"""The bounded queue of requests that have no slot."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple

from jaxserve.engine.request import Request
from jaxserve.engine.scheduler.fair_shares import FairShares
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

    Each tenant has such a queue of its own. When several wait, preempted requests of a class go
    first, then those of the tenant that has got the least for its weight.

    Bounds apply to new requests only, so that a preemption can never fail. A
    single request may exceed `max_tokens` if nothing else waits.

    Args:
        max_requests, max_tokens: most requests, and prompt tokens of them.
        key: None makes all keys equal.
        shares: None for requests that are all of one tenant.
    """

    def __init__(
        self,
        max_requests: int,
        max_tokens: int,
        key: QueueKey | None = None,
        *,
        shares: FairShares | None = None,
    ) -> None:
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._key = key
        self._entries: dict[str, _Entry] = {}
        self._shares = shares or FairShares({})
        self._heaps: dict[str, list[_Entry]] = {}
        """By tenant: every entry, and some that were taken out of `_entries` since."""
        self._num_turns = 0
        self._num_stale = 0
        """Most entries that may have been taken out since the heaps were last built."""
        self.num_tokens = 0
        """Prompt tokens that wait."""

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._entries

    @property
    def head(self) -> Request | None:
        if not self._heaps:
            return None
        entries = self._heads()
        if len(entries) > 1:
            service = self._shares.service()

            def rank(entry: _Entry) -> tuple[object, ...]:
                tenant = entry.request.generation.account.tenant
                is_new = entry.turn > 0
                return entry.priority, is_new, service.get(tenant, 0.0), entry.key, entry.turn

            entries.sort(key=rank)
        return entries[0].request if entries else None

    def _heads(self) -> list[_Entry]:
        """The first entry of each tenant that waits."""
        heads = []
        for tenant, heap in tuple(self._heaps.items()):
            while heap and self._entries.get(heap[0].request.request_id) is not heap[0]:
                heapq.heappop(heap)
            if heap:
                heads.append(heap[0])
            else:
                del self._heaps[tenant]
        return heads

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
        self._num_stale += 1
        if self._num_stale > len(self._entries) + 64:
            self._rebuild()
        return entry.request

    def _rebuild(self) -> None:
        """Forgets entries that were taken out."""
        self._num_stale = 0
        self._heaps.clear()
        for entry in self._entries.values():
            self._heaps.setdefault(entry.request.generation.account.tenant, []).append(entry)
        for heap in self._heaps.values():
            heapq.heapify(heap)

    def reorder(self, request: Request) -> None:
        """Moves a request that waits to where its key now says."""
        turn = self._entries[request.request_id].turn
        self.remove(request.request_id)
        self._insert(request, turn)

    def _insert(self, request: Request, turn: int) -> None:
        key = () if self._key is None else self._key(request)
        entry = _Entry(request.generation.priority, key, turn, request)
        self._entries[request.request_id] = entry
        tenant = request.generation.account.tenant
        if tenant not in self._heaps:
            self._shares.join(tenant, self._heaps)
            self._heaps[tenant] = []
        heapq.heappush(self._heaps[tenant], entry)
        self.num_tokens += request.num_prompt_tokens
