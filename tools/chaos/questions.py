"""What is asked, what must be answered, and what came."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

NUM_PROMPT_TOKENS = 48
NUM_OUTPUT_TOKENS = 64
FLUSH_TOKENS = 4
"""Tokens in a message, so that reading them leaves the clients time."""


class End(StrEnum):
    """How a stream ended, as the client saw it."""

    WHOLE = "whole"
    LEFT = "left"
    """The client cancelled it."""
    REFUSED = "refused"
    """The queue is full, or the server drains: it was never begun."""
    CUT = "cut"
    """It had begun, and an error that is said in the stream ended it."""
    UNREACHABLE = "unreachable"
    """Nothing listens, or the connection was reset before the head of an answer."""
    BROKEN = "broken"
    """The connection ended in the middle of an answer, or before its first token."""
    FAILED = "failed"
    """An error of the server: INTERNAL, 500, or one that no client should see."""


@dataclass(slots=True)
class Answer:
    """What one request brought. Times are of the client's monotonic clock."""

    question: int
    due_s: float
    token_ids: list[int] = field(default_factory=list)
    is_begun: bool = False
    """The server took the request: it sent the head of an answer."""
    message_s: list[float] = field(default_factory=list)
    end: End = End.FAILED
    detail: str = ""
    ended_s: float = 0.0
    retry_after_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Questions:
    """Greedy requests of one size."""

    prompts: Sequence[Sequence[int]]
    expected: Sequence[Sequence[int]]
    """What each is answered alone on an idle server."""

    def is_right(self, answer: Answer) -> bool:
        """No token is lost, doubled or another one, as far as the answer went."""
        expected = list(self.expected[answer.question])
        if answer.end is End.WHOLE:
            return answer.token_ids == expected
        return answer.token_ids == expected[: len(answer.token_ids)]


def make_prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Random token ids; a third of the prompts share their first half, for the prefix cache."""
    rng = np.random.default_rng(7)
    prompts: list[list[int]] = rng.integers(0, vocab_size, (count, NUM_PROMPT_TOKENS)).tolist()
    half = NUM_PROMPT_TOKENS // 2
    return [
        prompts[0][:half] + prompt[half:] if index % 3 == 0 else prompt
        for index, prompt in enumerate(prompts)
    ]
