"""ReplicaScheduler: D schedulers whose plans run side by side in one step.

Each replica has slots, pages, a queue and a prefix cache of its own, and plans as if it were
alone. A request goes to the replica with the fewest when it comes, and stays there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxserve.engine.pages import PagePool
from jaxserve.engine.plan import ReplicaPlans, StepResults
from jaxserve.engine.request import FinishReason, Request, TokenUpdate
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.scheduler import Scheduler


class ReplicaPages:
    """The replicas' page pools, counted together."""

    def __init__(self, pools: Sequence[PagePool]) -> None:
        self._pools = pools

    @property
    def num_free(self) -> int:
        return sum(pool.num_free for pool in self._pools)

    @property
    def num_cached(self) -> int:
        return sum(pool.num_cached for pool in self._pools)

    @property
    def num_total(self) -> int:
        return sum(pool.num_total for pool in self._pools)

    def reserve(self, shares: Mapping[str, float]) -> None:
        """As `PagePool.reserve`, in each pool."""
        for pool in self._pools:
            pool.reserve(shares)

    def forget(self) -> None:
        """Empties every prefix cache."""
        for pool in self._pools:
            pool.forget()


class ReplicaScheduler:
    """What a `Scheduler` is to one replica, to all of them. Not thread-safe.

    Args:
        schedulers: one for each replica, configured alike.
    """

    def __init__(self, schedulers: Sequence[Scheduler]) -> None:
        self._schedulers = schedulers
        self.pages = ReplicaPages([scheduler.pages for scheduler in schedulers])
        self._home: dict[str, Scheduler] = {}
        """Where each request is that has not ended."""
        self._next_step_id = 0

    @property
    def config(self) -> SchedulerConfig:
        """Of each replica."""
        return self._schedulers[0].config

    @property
    def has_work(self) -> bool:
        return any(scheduler.has_work for scheduler in self._schedulers)

    @property
    def num_running(self) -> int:
        return sum(scheduler.num_running for scheduler in self._schedulers)

    @property
    def num_waiting(self) -> int:
        return sum(scheduler.num_waiting for scheduler in self._schedulers)

    @property
    def num_waiting_tokens(self) -> int:
        return sum(scheduler.num_waiting_tokens for scheduler in self._schedulers)

    @property
    def num_preemptions(self) -> int:
        return sum(scheduler.num_preemptions for scheduler in self._schedulers)

    @property
    def num_drafts(self) -> int:
        return sum(scheduler.num_drafts for scheduler in self._schedulers)

    @property
    def num_draft_tokens(self) -> int:
        return sum(scheduler.num_draft_tokens for scheduler in self._schedulers)

    @property
    def num_accepted_tokens(self) -> int:
        return sum(scheduler.num_accepted_tokens for scheduler in self._schedulers)

    @property
    def prefix_cache_queries(self) -> int:
        return sum(scheduler.prefix_cache_queries for scheduler in self._schedulers)

    @property
    def prefix_cache_hits(self) -> int:
        return sum(scheduler.prefix_cache_hits for scheduler in self._schedulers)

    def add(self, request: Request) -> None:
        """Queues the request at the replica with the fewest requests, of these the one whose
        queue holds the fewest tokens. Raises as `Scheduler.add` does."""
        home = min(
            self._schedulers,
            key=lambda one: (one.num_running + one.num_waiting, one.num_waiting_tokens),
        )
        home.add(request)
        self._home[request.request_id] = home

    def plan(self, now_s: float) -> ReplicaPlans | None:
        """The next step of every replica; None if none of them has one."""
        plans = tuple(scheduler.plan(now_s) for scheduler in self._schedulers)
        if all(plan is None for plan in plans):
            return None
        self._next_step_id += 1
        return ReplicaPlans(self._next_step_id - 1, plans)

    def commit(
        self, plan: ReplicaPlans, results: Sequence[StepResults | None], now_s: float
    ) -> list[TokenUpdate]:
        """Takes in the results of the oldest step in flight, in the order of the replicas."""
        updates: list[TokenUpdate] = []
        for scheduler, own, result in zip(self._schedulers, plan.plans, results, strict=True):
            if own is not None:
                assert result is not None
                updates += scheduler.commit(own, result, now_s)
        for update in updates:
            if update.finish_reason is not None:
                self._home.pop(update.request.request_id, None)
        return updates

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """As `Scheduler.finish`."""
        home = self._home.pop(request_id, None)
        return None if home is None else home.finish(request_id, reason)

    def lose_steps(self) -> list[Request]:
        """As `Scheduler.lose_steps`, of every replica: they run in one step."""
        return [request for scheduler in self._schedulers for request in scheduler.lose_steps()]

    def check_integrity(self) -> None:
        """Raises AssertionError unless every replica's pages add up."""
        for scheduler in self._schedulers:
            scheduler.check_integrity()
