"""Sarathi-Serve's stall-free batching, and the half of it that is hybrid batches."""

from __future__ import annotations

from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.draft import StepDraft
from jaxserve.engine.scheduler.policies.base import Policy, longest_prefill
from jaxserve.engine.scheduler.rules import PolicyRules


class SarathiPolicy(Policy):
    """Stall-free batching: every decode, then unfinished prefills, then new requests.

    Decodes never wait for a prefill. A prefill that does not go in whole ends
    the step, so no younger one overtakes it.
    """

    name = "sarathi"

    def fill(self, draft: StepDraft) -> None:
        if not draft.add_decodes():
            return
        for request in draft.partial_prefills():
            if not draft.add_prefill(request):
                return
        while draft.admit_next():
            pass


class HybridOnlyPolicy(SarathiPolicy):
    """Hybrid batches without chunks: decodes wait for the whole prompt beside them."""

    name = "hybrid_only"
    rules = PolicyRules(whole_prompts=True)

    def max_step_rows(self, config: SchedulerConfig) -> int:
        return longest_prefill(config) + config.max_num_seqs - 1
