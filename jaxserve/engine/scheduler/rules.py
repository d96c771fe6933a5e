"""PolicyRules: what a policy wants of memory and prompts, beside its order."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto


class PageGrant(Enum):
    """Which pages a request gets when it is admitted."""

    KNOWN_TOKENS = auto()
    """Those of every token known so far, while the watermark stays free.
    A prefill then never waits for memory, and decodes take page after page."""
    LONGEST_SEQUENCE = auto()
    """Those of `max_model_len` tokens. Nothing is ever preempted."""
    FIRST_CHUNK = auto()
    """Those of its first chunk; later chunks take their own, and may have to
    preempt for them."""


@dataclass(frozen=True, slots=True)
class PolicyRules:
    whole_prompts: bool = False
    """A prompt goes into one step. Those whose logprobs are asked for are the
    exception, since only a few rows of a step go through the LM head."""
    page_grant: PageGrant = PageGrant.KNOWN_TOKENS
    resume_headroom: bool = True
    """A preempted request comes back only when memory lasts for a token."""
    decodes_first: bool = True
    """Every decode is in a step before its first prefill."""

    @property
    def sizes_chunks(self) -> bool:
        """Whether a budget can decide how long a step takes."""
        return self.decodes_first and not self.whole_prompts
