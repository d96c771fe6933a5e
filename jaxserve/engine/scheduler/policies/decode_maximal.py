"""SARATHI's decode-maximal batching, the forerunner of Sarathi-Serve."""

from __future__ import annotations

from jaxserve.engine.scheduler.draft import StepDraft
from jaxserve.engine.scheduler.policies.base import Policy
from jaxserve.engine.scheduler.rules import PageGrant, PolicyRules


class DecodeMaximalPolicy(Policy):
    """One chunk of the oldest unfinished prompt, and every decode beside it.

    Chunk and decodes together have `token_budget` rows, so that the fused
    matrix product keeps its tile. Each of the B slots holds the memory of the
    longest sequence, so one of them prefills beside at most B - 1 decodes.
    """

    name = "sarathi_decode_maximal"
    rules = PolicyRules(page_grant=PageGrant.LONGEST_SEQUENCE)

    def fill(self, draft: StepDraft) -> None:
        if not draft.add_decodes():
            return
        unfinished = draft.partial_prefills()
        if unfinished:
            draft.add_prefill(unfinished[0])
        else:
            draft.admit_next()
