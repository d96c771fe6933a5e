"""Everything the scheduler knows between two calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from jaxserve.engine.pages import PageIntegrityError, PagePool
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.fair_shares import FairShares
from jaxserve.engine.scheduler.waiting import QueueKey, WaitingQueue


@dataclass(frozen=True, slots=True)
class DecodeColumns:
    """Of the decodes in a step; valid until a request leaves its slot."""

    requests: Sequence[Request]
    request_ids: tuple[str, ...]
    slots: tuple[int, ...]

    @classmethod
    def of(cls, requests: Sequence[Request]) -> DecodeColumns:
        slots = cast("list[int]", [request.slot for request in requests])
        return cls(requests, tuple([request.request_id for request in requests]), tuple(slots))


@dataclass(slots=True, eq=False)
class SchedulerState:
    """Requests by stage, and the slots and pages they hold.

    A request is in exactly one of `waiting`, `running`, `draining` or gone.
    """

    config: SchedulerConfig
    pages: PagePool
    waiting: WaitingQueue
    free_slots: list[int]
    shares: FairShares
    running: dict[str, Request]
    """Holders of a slot in order of admission. Policies that admit in order of
    arrival have the oldest first, since a preemption takes the youngest."""
    draining: set[Request] = field(default_factory=set)
    """Finished, but steps in flight still use their slot and pages."""
    num_masked: int = 0
    """Running requests that have `masks`: where there are none, no step asks each for them."""
    num_speculating: int = 0
    """Running requests that have `speculation`."""
    decode_columns: DecodeColumns | None = None
    """Of the last step with decodes, for the next one with the same."""
    num_preemptions: int = 0
    num_drafts: int = 0
    """Checks of a draft whose results were taken in."""
    num_draft_tokens: int = 0
    """Of these drafts."""
    num_accepted_tokens: int = 0
    """Those of `num_draft_tokens` that came out."""
    prefix_cache_queries: int = 0
    """Tokens of first admissions that were looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Those of them that were found."""

    @classmethod
    def empty(cls, config: SchedulerConfig, queue_key: QueueKey | None = None) -> SchedulerState:
        running: dict[str, Request] = {}
        shares = FairShares(running)
        return cls(
            config=config,
            pages=PagePool(
                config.num_pages, config.page_size, prefix_caching=config.prefix_caching
            ),
            waiting=WaitingQueue(
                config.max_queued_requests, config.max_queued_tokens, queue_key, shares=shares
            ),
            free_slots=list(range(config.max_num_seqs - 1, -1, -1)),
            shares=shares,
            running=running,
        )

    def num_pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.page_size)

    def preempt(self, request: Request) -> None:
        """Sends a running request that is not in flight back to the queue's front.

        Prompt, output and their counts stay as they are; what was computed is
        computed again, apart from what the prefix cache still holds then.
        """
        self._leave_running(request)
        self.release(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.push_front(request)

    def lose_pages(self) -> list[Request]:
        """Preempts all that run, with their steps in flight, and empties the prefix cache.

        Returns them in order of admission, in which they also wait.
        """
        running = list(self.running.values())
        for request in [*self.draining, *running]:
            request.num_in_flight_steps = 0
        for request in tuple(self.draining):
            self.release(request)
        for request in reversed(running):
            self.preempt(request)
        self.pages.forget()
        return running

    def retire(self, request: Request) -> None:
        """Takes a finished request out of `running`."""
        self._leave_running(request)
        self.shares.charge(request)
        if request.num_in_flight_steps:
            self.draining.add(request)
        else:
            self.release(request)

    def _leave_running(self, request: Request) -> None:
        del self.running[request.request_id]
        self.decode_columns = None
        self.num_masked -= request.masks is not None
        self.num_speculating -= request.speculation is not None

    def release(self, request: Request) -> None:
        """Gives slot and pages back. No step in flight may use them."""
        if request.slot is None or request.num_in_flight_steps:
            raise PageIntegrityError(f"{request.request_id} holds no slot or is in flight")
        self.draining.discard(request)
        self.pages.release(request.page_ids)
        request.page_ids = []
        request.num_registered_pages = 0
        self.free_slots.append(request.slot)
        request.slot = None

    def check_integrity(self) -> None:
        """Raises PageIntegrityError unless pages and slots are all accounted for."""
        holders = [*self.running.values(), *self.draining]
        self.pages.check_integrity(request.page_ids for request in holders)
        used_slots = [request.slot for request in holders if request.slot is not None]
        if sorted(self.free_slots + used_slots) != list(range(self.config.max_num_seqs)):
            raise PageIntegrityError(f"slots {used_slots} in use, {self.free_slots} free")
