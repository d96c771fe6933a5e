"""The half of stall-free batching that is chunked prefills."""

from __future__ import annotations

from jaxserve.engine.scheduler.draft import StepDraft
from jaxserve.engine.scheduler.policies.base import Policy


class ChunkedOnlyPolicy(Policy):
    """Chunks without hybrid batches: turns of prefills and of decodes alternate.

    A turn that has nothing to do falls to the other.
    """

    name = "chunked_only"

    def __init__(self) -> None:
        self._is_prefill_turn = True

    def fill(self, draft: StepDraft) -> None:
        if self._is_prefill_turn:
            self._add_prefills(draft)
            if not draft.is_empty:
                self._is_prefill_turn = False
                return
        if not draft.add_decodes():
            return
        if not draft.is_empty:
            self._is_prefill_turn = True
            return
        self._add_prefills(draft)
        self._is_prefill_turn = draft.is_empty

    def _add_prefills(self, draft: StepDraft) -> None:
        for request in draft.partial_prefills():
            if not draft.add_prefill(request):
                return
        while draft.admit_next():
            pass
