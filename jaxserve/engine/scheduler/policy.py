"""Policies: in which order requests get into a step, and nothing else.

Memory, budgets, slots and positions are the draft's business, so a policy is
a few lines and can't break their rules.
"""

from __future__ import annotations

from typing import Protocol

from jaxserve.engine.scheduler.draft import StepDraft
from jaxserve.errors import ConfigError


class Policy(Protocol):
    def fill(self, draft: StepDraft) -> None:
        """Adds chunks to an empty draft until nothing more should go in."""
        ...


class SarathiPolicy:
    """Stall-free batching: every decode, then unfinished prefills, then new requests.

    Decodes never wait for a prefill. A prefill that does not go in whole ends
    the step, so no younger one overtakes it.
    """

    def fill(self, draft: StepDraft) -> None:
        if not draft.add_decodes():
            return
        for request in draft.partial_prefills():
            if not draft.add_prefill(request):
                return
        while draft.admit_next():
            pass


_POLICIES: dict[str, type[Policy]] = {"sarathi": SarathiPolicy}


def make_policy(name: str) -> Policy:
    """Raises ConfigError for a name that is not known."""
    if name not in _POLICIES:
        raise ConfigError(f"--policy must be one of {', '.join(_POLICIES)}, not {name!r}")
    return _POLICIES[name]()
