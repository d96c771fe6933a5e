"""Orca's iteration-level batching."""

from __future__ import annotations

from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.draft import StepDraft
from jaxserve.engine.scheduler.policies.base import Policy, longest_prefill
from jaxserve.engine.scheduler.rules import PageGrant, PolicyRules


class OrcaPolicy(Policy):
    """Whole prompts join the decodes as soon as a slot and its memory are free.

    Memory of the longest sequence is reserved for each request, so none is
    ever preempted.

    Args:
        max_step_rows: default: the longest prompt beside a decode in every
            other slot. Orca itself has no limit; a simulator can ask for more.
    """

    name = "orca"
    rules = PolicyRules(whole_prompts=True, page_grant=PageGrant.LONGEST_SEQUENCE)

    def __init__(self, max_step_rows: int | None = None) -> None:
        self._max_step_rows = max_step_rows

    def max_step_rows(self, config: SchedulerConfig) -> int:
        least = longest_prefill(config) + config.max_num_seqs - 1
        return max(least, self._max_step_rows or 0)

    def fill(self, draft: StepDraft) -> None:
        if not draft.add_decodes():
            return
        for request in draft.partial_prefills():
            if not draft.add_prefill(request):
                return
        while draft.admit_next():
            pass
