"""vLLM's two schedulers: prefill-first, and the unified one of V1."""

from __future__ import annotations

from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.draft import StepDraft
from jaxserve.engine.scheduler.policies.base import Policy, longest_prefill
from jaxserve.engine.scheduler.rules import PageGrant, PolicyRules


class VllmV0Policy(Policy):
    """Prefill first: while the head of the queue fits, a step holds whole
    prompts alone and every decode waits (the generation stall)."""

    name = "vllm_v0"
    rules = PolicyRules(whole_prompts=True, resume_headroom=False, decodes_first=False)

    def max_step_rows(self, config: SchedulerConfig) -> int:
        return max(longest_prefill(config), config.max_num_seqs)

    def fill(self, draft: StepDraft) -> None:
        for request in draft.partial_prefills():
            if not draft.add_prefill(request):
                return
        while draft.admit_next():
            pass
        if draft.is_empty:
            draft.add_decodes()


class VllmV1Policy(Policy):
    """No phases: running requests in order of admission, then new ones.

    Chunks take their pages as they go, so more requests get in, but a prompt
    can be preempted half-way; and a long prefill ahead of a decode can use up
    the step.
    """

    name = "vllm_v1"
    rules = PolicyRules(page_grant=PageGrant.FIRST_CHUNK, decodes_first=False)

    def fill(self, draft: StepDraft) -> None:
        for request in draft.returned():
            if not draft.advance(request):
                return
        while draft.admit_next():
            pass
