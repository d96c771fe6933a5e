"""Deadline order: who would be late first goes first."""

from __future__ import annotations

from collections import deque

from jaxserve.engine.plan import StepPlan
from jaxserve.engine.request import Request, ServiceObjective
from jaxserve.engine.scheduler.deadlines import DEFAULT_OBJECTIVE, first_token_deadline_s
from jaxserve.engine.scheduler.draft import StepDraft
from jaxserve.engine.scheduler.policies.base import Policy


class SlackPolicy(Policy):
    """Every decode, then prefills by first-token deadline and remaining length.

    The rank of a prefill is its deadline plus `seconds_per_token` for each
    token that it still has to compute. At 0 that is earliest deadline first;
    above it short prefills overtake long ones, which serves more requests in
    time under overload and fewer of the long ones. A request that waits and
    can't make its deadline any more is put behind the others once, so that it
    doesn't make them late as well.

    Args:
        objective: of requests that bring none.
        seconds_per_token: weight of the remaining prefill.
        tokens_per_s: prefill throughput to begin with; it then follows the
            measured steps.
        decay: weight of the past in that throughput, per step.
    """

    name = "slack"

    def __init__(
        self,
        objective: ServiceObjective = DEFAULT_OBJECTIVE,
        *,
        seconds_per_token: float = 0.0,
        tokens_per_s: float = 8500.0,
        decay: float = 0.995,
    ) -> None:
        self._objective = objective
        self._seconds_per_token = seconds_per_token
        self._tokens_per_s = tokens_per_s
        self._decay = decay

    def queue_key(self, request: Request) -> tuple[float, ...]:
        num_left = request.num_tokens - request.num_computed_tokens
        return (
            float(request.is_relegated),
            self._deadline_s(request) + self._seconds_per_token * num_left,
        )

    def fill(self, draft: StepDraft) -> None:
        if not draft.add_decodes():
            return
        unfinished = deque(sorted(draft.partial_prefills(), key=self._rank))
        may_admit = True
        while may_admit or unfinished:
            head = self._next_waiting(draft) if may_admit else None
            if head is None and not unfinished:
                return
            if head is None or (unfinished and self._rank(unfinished[0]) <= self._rank(head)):
                if not draft.add_prefill(unfinished.popleft()):
                    return
                continue
            num_rows_left = draft.num_rows_left
            if not draft.admit_next():
                if draft.num_rows_left < num_rows_left:
                    return
                may_admit = False  # It waits for memory or a slot: nobody overtakes it.

    def committed(self, plan: StepPlan, step_s: float) -> None:
        if plan.prefills and step_s > 0:
            num_tokens = sum(chunk.num_tokens for chunk in plan.prefills)
            measured = num_tokens / step_s
            self._tokens_per_s += (1 - self._decay) * (measured - self._tokens_per_s)

    def _next_waiting(self, draft: StepDraft) -> Request | None:
        """The head of the queue, after requests without hope were put behind."""
        while (head := draft.next_waiting) is not None and not head.is_relegated:
            prefill_s = head.num_tokens / self._tokens_per_s
            if draft.now_s + prefill_s <= self._deadline_s(head) or head.output_token_ids:
                break
            draft.relegate(head)
        return head

    def _deadline_s(self, request: Request) -> float:
        return first_token_deadline_s(request, request.generation.objective or self._objective)

    def _rank(self, request: Request) -> tuple[float, ...]:
        return (request.generation.priority, *self.queue_key(request))
