"""What a step costs depends on: a few totals of its plan."""

from __future__ import annotations

from typing import NamedTuple

from jaxserve.engine.plan import StepPlan


class StepFeatures(NamedTuple):
    """Totals of one step, enough for every cost model."""

    num_tokens: int
    """Rows that carry a token."""
    num_rows_bucket: int
    """Rows of the compiled step, padding included."""
    num_seqs: int
    num_decodes: int
    decode_context: int
    """Keys that the decode rows read, summed over them."""
    num_prefills: int
    num_prefill_tokens: int
    prefill_pairs: float
    """Query-key pairs of the prefill chunks: for c tokens after k computed
    ones c * (k + c / 2)."""

    @classmethod
    def of(cls, plan: StepPlan) -> StepFeatures:
        num_decodes, num_prefills = len(plan.decodes), len(plan.prefills)
        num_prefill_tokens, pairs = 0, 0.0
        for chunk in plan.prefills:
            num_prefill_tokens += chunk.num_tokens
            pairs += chunk.num_tokens * (chunk.start + 0.5 * chunk.num_tokens)
        return cls(
            num_tokens=num_decodes + num_prefill_tokens,
            num_rows_bucket=plan.num_rows_bucket,
            num_seqs=num_decodes + num_prefills,
            num_decodes=num_decodes,
            decode_context=sum(plan.decodes.positions) + num_decodes,
            num_prefills=num_prefills,
            num_prefill_tokens=num_prefill_tokens,
            prefill_pairs=pairs,
        )

    @classmethod
    def of_hybrid(
        cls, num_decodes: int, context: int, num_prefill_tokens: int, start: int = 0
    ) -> StepFeatures:
        """Decodes that each read `context` keys, and a chunk (if it has tokens)
        after `start` computed ones. No padding."""
        num_prefills = int(num_prefill_tokens > 0)
        num_tokens = num_decodes + num_prefill_tokens
        return cls(
            num_tokens=num_tokens,
            num_rows_bucket=num_tokens,
            num_seqs=num_decodes + num_prefills,
            num_decodes=num_decodes,
            decode_context=num_decodes * context,
            num_prefills=num_prefills,
            num_prefill_tokens=num_prefill_tokens,
            prefill_pairs=num_prefill_tokens * (start + 0.5 * num_prefill_tokens),
        )

    @classmethod
    def of_prefill(cls, num_tokens: int, start: int = 0) -> StepFeatures:
        """One prefill chunk alone, after `start` computed tokens."""
        return cls.of_hybrid(0, 0, num_tokens, start)

    @classmethod
    def of_decodes(cls, num_decodes: int, context: int) -> StepFeatures:
        """Decodes alone, each reading `context` keys."""
        return cls.of_hybrid(num_decodes, context, 0)
