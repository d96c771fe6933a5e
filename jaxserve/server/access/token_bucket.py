"""TokenBucket: a rate of tokens, with room for a burst."""

from __future__ import annotations


class TokenBucket:
    """Full at the beginning. What is taken may exceed what is there: the length of an answer is
    not known before its end, so the debt is paid by waiting longer for the next request.

    Args:
        tokens_per_s: refills it.
        burst: most tokens that it holds.
        now_s: on the clock of all later calls.
    """

    def __init__(self, tokens_per_s: float, burst: float, now_s: float) -> None:
        self.tokens_per_s = tokens_per_s
        self.burst = burst
        self._level = burst
        self._updated_s = now_s

    def level(self, now_s: float) -> float:
        """Tokens that are there; negative for a debt."""
        gained = (now_s - self._updated_s) * self.tokens_per_s
        self._level = min(self.burst, self._level + gained)
        self._updated_s = now_s
        return self._level

    def wait_s(self, num_tokens: int, now_s: float) -> float:
        """How long until so many are there, or a full burst if they are more; 0: now."""
        missing = min(float(num_tokens), self.burst) - self.level(now_s)
        return max(0.0, missing / self.tokens_per_s)

    def take(self, num_tokens: int, now_s: float) -> None:
        """Negative to give back."""
        self._level = min(self.burst, self.level(now_s) - num_tokens)
