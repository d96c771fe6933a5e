"""FasterTransformer's request-level batching."""

from __future__ import annotations

from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.draft import StepDraft
from jaxserve.engine.scheduler.policies.base import Policy, longest_prefill
from jaxserve.engine.scheduler.rules import PageGrant, PolicyRules


class FasterTransformerPolicy(Policy):
    """A batch is prefilled together and decoded to its last request; only then
    does the next one start. A request that ends early gives its memory back.

    Args:
        max_step_rows: default: the longest prompt. Limits the prompt tokens of
            a batch; a simulator can ask for more.
    """

    name = "fastertransformer"
    rules = PolicyRules(whole_prompts=True, page_grant=PageGrant.LONGEST_SEQUENCE)

    def __init__(self, max_step_rows: int | None = None) -> None:
        self._max_step_rows = max_step_rows

    def max_step_rows(self, config: SchedulerConfig) -> int:
        return max(longest_prefill(config), config.max_num_seqs, self._max_step_rows or 0)

    def fill(self, draft: StepDraft) -> None:
        if not draft.returned():
            while draft.admit_next():
                pass
            return
        if not draft.add_decodes():
            return
        for request in draft.partial_prefills():
            if not draft.add_prefill(request):
                return
