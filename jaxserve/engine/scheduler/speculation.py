"""Speculation: what a request's own text says will come next, and how far to trust it.

Prompt lookup: where the last tokens stand once before, what followed there is the draft. A chunk
checks it: its first row computes the last token, the others drafted ones, and all of them draw.
"""

from __future__ import annotations

from collections import deque

from jaxserve.engine.plan import TAKE_FROM_SLOT, Chunk
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler.config import SpeculationConfig

_MAX_INDEXED_AT_ONCE = 512
"""Tokens that one plan takes into the index, so that a long prompt holds up no step."""
_MAX_CANDIDATES = 8
"""Places that a lookup compares."""
_FIRST_PAUSE_TOKENS = 4
_MAX_DOUBLINGS = 5


def can_speculate(request: Request) -> bool:
    """Whether its tokens can be drawn side by side: penalties and grammars depend on the last."""
    sampling = request.sampling
    is_penalised = (
        sampling.repetition_penalty != 1.0
        or sampling.presence_penalty != 0.0
        or sampling.frequency_penalty != 0.0
    )
    return request.masks is None and not is_penalised


class Speculation:
    """Of one request; it follows the request through all its lives.

    Checks return in the order in which they were planned. While one is in flight nobody knows the
    next position: either another one follows that counts on it, or the request sits out.
    """

    def __init__(self, config: SpeculationConfig, request: Request) -> None:
        self._config = config
        self._num_prompt = request.num_prompt_tokens
        self._tokens = list(request.generation.prompt_token_ids)
        """Prompt and output, as far as they were looked at."""
        self._latest: dict[tuple[int, ...], int] = {}
        """The last `lookup_min` tokens -> latest position that followed them."""
        self._earlier: list[int] = []
        """The same of each position from `lookup_min` on -> the one before; 0 without one."""
        self._distance: int | None = None
        """The draft says: a token is the one so many positions before it."""
        self._checks: deque[int] = deque()
        """First tokens of the checks in flight, oldest first."""
        self._num_dropped = 0
        """Checks in flight before those that count on what came out otherwise."""
        self._num_right = 0
        """Drafts in a row of which every token came out."""
        self._num_wrong = 0
        self._resumes_at = 0
        """Number of tokens from which on it drafts again."""
        self._slot_has_token = True
        """The slot's last token is the request's, not that of any row of a check."""

    @property
    def sits_out(self) -> bool:
        """It waits for a check in flight that nothing is built on."""
        return bool(self._checks) and not self._num_right

    def begin_life(self) -> None:
        """The request gets a slot, and computes all its tokens there."""
        self._checks.clear()
        self._num_dropped = self._num_right = 0
        self._slot_has_token = True

    def next_rows(self, request: Request, max_drafts: int) -> tuple[int, ...] | None:
        """Tokens of its next chunk, the last ones drafted; empty for a plain decode.

        None: it can't be in this step. A check is noted as planned.

        Args:
            request: ready to decode from `num_computed_tokens` on.
            max_drafts: for which there is room.
        """
        self._catch_up(request)
        start, num_drafts = request.num_computed_tokens, min(max_drafts, self._config.num_tokens)
        if self._checks:
            if num_drafts <= 0 or self._distance is None:
                return None
            first = self._guess(start)
        else:
            first = TAKE_FROM_SLOT if self._slot_has_token else self._tokens[start]
            self._distance = self._look_up() if num_drafts > 0 else None
            if self._distance is None:
                rows = () if self._slot_has_token else (first,)
                self._slot_has_token = True
                return rows
        self._checks.append(first)
        self._slot_has_token = False
        return first, *(self._guess(start + 1 + index) for index in range(num_drafts))

    def is_dropped(self) -> bool:
        """A check came back; whether it counted on what came out otherwise."""
        if self._num_dropped:
            self._num_dropped -= 1
            return True
        self._checks.popleft()
        return False

    def settle(self, request: Request, chunk: Chunk, num_right: int) -> None:
        """Takes in what a check of `chunk` gave: `num_right` drafts, and another token."""
        is_right = num_right == chunk.num_drafts
        if is_right and self._checks:
            is_right = self._checks[0] == request.output_token_ids[-1]
        if is_right:
            self._num_right += 1
            self._num_wrong = 0
            return
        self._num_dropped += len(self._checks)
        self._checks.clear()
        self._num_right = 0
        request.num_computed_tokens = request.num_tokens - 1
        if 2 * num_right < chunk.num_drafts:
            pause = _FIRST_PAUSE_TOKENS << min(self._num_wrong, _MAX_DOUBLINGS)
            self._num_wrong += 1
            self._resumes_at = request.num_tokens + pause

    def _guess(self, position: int) -> int:
        """The drafted token at a position that is not known yet."""
        assert self._distance is not None
        num_known = len(self._tokens)
        offset = (position - num_known) % self._distance
        return self._tokens[num_known - self._distance + offset]

    def _catch_up(self, request: Request) -> None:
        """Takes new tokens in, and those that another one follows into the index."""
        tokens, size = self._tokens, self._config.lookup_min
        tokens += request.output_token_ids[len(tokens) - self._num_prompt :]
        first = size + len(self._earlier)
        for position in range(first, min(len(tokens), first + _MAX_INDEXED_AT_ONCE)):
            key = tuple(tokens[position - size : position])
            self._earlier.append(self._latest.get(key, 0))
            self._latest[key] = position

    def _look_up(self) -> int | None:
        """How far back the place is that the last tokens match best; None without any."""
        tokens, size, longest = self._tokens, self._config.lookup_min, self._config.lookup_max
        num_known = len(tokens)
        if num_known < self._resumes_at or len(self._earlier) < num_known - size:
            return None
        best, best_length = 0, 0
        place = self._latest.get(tuple(tokens[num_known - size :]), 0)
        for _ in range(_MAX_CANDIDATES):
            if not place or best_length == longest:
                break
            length = size
            while (
                length < min(longest, place)
                and tokens[place - length - 1] == tokens[num_known - length - 1]
            ):
                length += 1
            if length > best_length:
                best, best_length = place, length
            place = self._earlier[place - size]
        return num_known - best if best else None
