"""StepRoom: what a step that is being filled can still take."""

from __future__ import annotations

from collections.abc import Callable

from jaxserve.engine.plan import Chunk
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler.budget import PrefillLimit
from jaxserve.engine.scheduler.config import SchedulerConfig


class StepRoom:
    """Rows, rows through the LM head, sequences and time that are left.

    Args:
        config: limits of rows through the LM head and of sequences.
        max_rows: of this step.
        prefill_limit: the budget's; asked for when the first prefill is, since
            it depends on the decodes.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        max_rows: int,
        prefill_limit: Callable[[], PrefillLimit],
    ) -> None:
        self.num_rows = max_rows
        self.num_sample_rows = config.num_sample_rows
        self.num_seqs = config.max_seqs_per_step or config.max_num_seqs
        self._make_limit = prefill_limit
        self._limit: PrefillLimit | None = None

    @property
    def has_decode(self) -> bool:
        """Whether one more decode fits."""
        return min(self.num_rows, self.num_sample_rows, self.num_seqs) > 0

    def take_decodes(self, count: int) -> None:
        # A budget may ask for less than the decodes take; they go in all the same.
        self.num_rows = max(0, self.num_rows - count)
        self.num_sample_rows -= count
        self.num_seqs -= count

    def prefill_tokens(self, request: Request, start: int) -> int:
        """Size of the chunk of `request` at `start` that fits; may be 0."""
        remaining = request.num_prefill_tokens - start
        num_tokens = min(remaining, self.num_rows)
        if num_tokens <= 0 or not self.num_seqs:
            return 0
        if self._limit is None:
            self._limit = self._make_limit()
        num_tokens = self._limit.max_tokens(start, num_tokens)
        if request.has_unscored_prompt:
            # Positions before `scored_from` were reported in an earlier life.
            scored_from = request.num_prompt_logprobs
            if start < scored_from:
                return min(num_tokens, scored_from - start)
            return min(num_tokens, self.num_sample_rows)
        if num_tokens == remaining and self.num_sample_rows == 0:
            return num_tokens - 1
        return num_tokens

    def take_chunk(self, chunk: Chunk) -> None:
        """A prefill chunk that `prefill_tokens` has sized."""
        self.num_rows -= chunk.num_tokens
        self.num_sample_rows -= chunk.num_sample_rows
        self.num_seqs -= 1
        if self._limit is not None:
            self._limit.add(chunk.start, chunk.num_tokens)
