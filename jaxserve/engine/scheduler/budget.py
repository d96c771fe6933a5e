"""How large a step may be, and which compiled step holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from jaxserve.engine.plan import StepPlan
from jaxserve.engine.request import Request, ServiceObjective
from jaxserve.engine.scheduler.deadlines import next_token_deadline_s
from jaxserve.engine.step_cost import StepCost, add_chunk
from jaxserve.engine.step_features import StepFeatures
from jaxserve.errors import ConfigError


@dataclass(frozen=True, slots=True)
class StepContext:
    """What a budget may look at when a step is about to take prefills."""

    now_s: float
    buckets: Sequence[int]
    decodes: Sequence[Request]
    """Those that are in the step; their positions are already advanced."""
    in_flight: Sequence[StepPlan]
    """Planned before this one and not committed, oldest first."""
    oldest_started_s: float
    """When the oldest of them began to run."""


TBT_MARGIN = 0.9
"""Share of a TBT objective that a step may take; the host and chance get the rest."""


class PrefillLimit(Protocol):
    """How many prefill tokens one step may still take."""

    def max_tokens(self, start: int, num_wanted: int) -> int:
        """Tokens of a chunk at position `start`; at most `num_wanted`, may be 0."""
        ...

    def add(self, start: int, num_tokens: int) -> None:
        """That chunk went in."""
        ...


class StepBudget(Protocol):
    """Limits a step's size; policies only choose what goes in."""

    def max_rows(self) -> int:
        """Most rows of the step that is about to be planned; at most the
        configured token budget. Decodes go in even if they are more."""
        ...

    def min_prefill_tokens(self, num_decodes: int) -> int:
        """Prefill tokens, at least 1, that any step beside so many decodes takes."""
        ...

    def prefill_limit(self, context: StepContext) -> PrefillLimit:
        """What limits the step's prefills beside its rows."""
        ...


class NoPrefillLimit:
    """The rows alone count."""

    def max_tokens(self, start: int, num_wanted: int) -> int:  # noqa: ARG002
        return num_wanted

    def add(self, start: int, num_tokens: int) -> None:
        pass


NO_PREFILL_LIMIT = NoPrefillLimit()


class TokenBudget:
    """The same number of rows for every step (tau)."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def max_rows(self) -> int:
        return self._num_tokens

    def min_prefill_tokens(self, num_decodes: int) -> int:
        return max(1, self._num_tokens - num_decodes)

    def prefill_limit(self, context: StepContext) -> PrefillLimit:  # noqa: ARG002
        return NO_PREFILL_LIMIT


class TimeBudget:
    """Prefills fill a step up to a predicted time.

    Steps take about the same time whatever their context lengths are, so
    chunks shrink by themselves as the cache in front of them grows.

    Args:
        cost: predicts a step's seconds.
        target_s: what a step with prefills may take.
        max_rows: most rows of a step (the configured token budget).
        min_chunk: tokens that the first chunk of a step gets even if the step
            then is over the target, so that prompts always go forward.
    """

    def __init__(
        self, cost: StepCost, target_s: float, *, max_rows: int, min_chunk: int = 16
    ) -> None:
        if target_s <= 0 or min_chunk < 1:
            raise ConfigError("a time budget needs a positive target and a chunk of 1 or more")
        self._cost = cost
        self._target_s = target_s
        self._max_rows = max_rows
        self._min_chunk = min_chunk

    def max_rows(self) -> int:
        return self._max_rows

    def min_prefill_tokens(self, num_decodes: int) -> int:
        return max(1, min(self._min_chunk, self._max_rows - num_decodes))

    def prefill_limit(self, context: StepContext) -> PrefillLimit:
        return TimeLimit(self._cost, self._target_s, context, self._min_chunk)


class SlackBudget:
    """Prefills may take the time that the most urgent decode can spare.

    Slack is the time from now to the earliest deadline of a decode in the step
    (`next_token_deadline_s`), less what the steps in flight still take.

    Args:
        cost: predicts a step's seconds.
        objective: of requests that bring none.
        max_rows: most rows of a step.
        min_chunk: see `TimeBudget`.
        safety: the predicted time times this must be within the slack.
        strict_gaps: deadlines count from the token before, not from the arrival.
    """

    def __init__(
        self,
        cost: StepCost,
        objective: ServiceObjective,
        *,
        max_rows: int,
        min_chunk: int = 16,
        safety: float = 1.2,
        strict_gaps: bool = False,
    ) -> None:
        if min_chunk < 1 or safety < 1.0:
            raise ConfigError("a slack budget needs a chunk of 1 or more and a safety of 1 or more")
        self._cost = cost
        self._objective = objective
        self._max_rows = max_rows
        self._min_chunk = min_chunk
        self._safety = safety
        self._strict_gaps = strict_gaps

    def max_rows(self) -> int:
        return self._max_rows

    def min_prefill_tokens(self, num_decodes: int) -> int:
        return max(1, min(self._min_chunk, self._max_rows - num_decodes))

    def prefill_limit(self, context: StepContext) -> PrefillLimit:
        if not context.decodes:
            return NO_PREFILL_LIMIT
        start_s = context.now_s + self._in_flight_s(context)
        deadline_s = min(
            next_token_deadline_s(
                request,
                request.generation.objective or self._objective,
                start_s,
                strict_gaps=self._strict_gaps,
            )
            for request in context.decodes
        )
        return TimeLimit(
            self._cost, (deadline_s - start_s) / self._safety, context, self._min_chunk
        )

    def _in_flight_s(self, context: StepContext) -> float:
        """Predicted seconds until the steps in flight are through."""
        if not context.in_flight:
            return 0.0
        total_s = sum(self._cost.predict_s(StepFeatures.of(plan)) for plan in context.in_flight)
        return max(0.0, total_s - (context.now_s - context.oldest_started_s))


class TimeLimit:
    """Keeps one step's predicted time within a target."""

    def __init__(
        self, cost: StepCost, target_s: float, context: StepContext, min_chunk: int
    ) -> None:
        self._cost = cost
        self._target_s = target_s
        self._buckets = context.buckets
        self._min_chunk = min_chunk
        decode_context = sum(request.num_computed_tokens for request in context.decodes)
        self._step = decode_step(
            len(context.decodes),
            decode_context,
            smallest_bucket(context.buckets, len(context.decodes)),
        )

    def max_tokens(self, start: int, num_wanted: int) -> int:
        """The largest chunk by bisection, since a cost never falls with the chunk."""
        if num_wanted < 1 or self._predict_s(start, num_wanted) <= self._target_s:
            return num_wanted
        fits, too_many = 0, num_wanted
        while too_many - fits > 1:
            middle = (fits + too_many) // 2
            if self._predict_s(start, middle) <= self._target_s:
                fits = middle
            else:
                too_many = middle
        if self._step.num_prefills:
            return fits
        return max(fits, min(self._min_chunk, num_wanted))

    def add(self, start: int, num_tokens: int) -> None:
        self._step = self._with_chunk(start, num_tokens)

    def _predict_s(self, start: int, num_tokens: int) -> float:
        return self._cost.predict_s(self._with_chunk(start, num_tokens))

    def _with_chunk(self, start: int, num_tokens: int) -> StepFeatures:
        num_rows = self._step.num_tokens + num_tokens
        bucket = smallest_bucket(self._buckets, num_rows)
        return add_chunk(self._step, start, num_tokens, bucket)


def choose_token_budget(
    cost: StepCost,
    slo_tbt_s: float,
    candidates: Sequence[int],
    *,
    num_decodes: int,
    decode_context: int,
    chunk_start: int,
    margin: float = 1.0,
) -> int:
    """The largest token budget whose full step keeps the TBT objective (auto-tau).

    Args:
        candidates: budgets to choose from, usually the compiled buckets; each
            is taken as a step of as many rows.
        num_decodes: in the step that the objective must hold for.
        decode_context: keys that they read, summed over them.
        chunk_start: computed tokens in front of the chunk.
        margin: share of the objective that the step may take.

    Raises ConfigError if no candidate holds the decodes and keeps it.
    """
    best, shortest_s = 0, float("inf")
    for tau in candidates:
        if tau < num_decodes:
            continue
        step = decode_step(num_decodes, decode_context, tau)
        if tau > num_decodes:
            step = add_chunk(step, chunk_start, tau - num_decodes, tau)
        step_s = cost.predict_s(step)
        shortest_s = min(shortest_s, step_s)
        if step_s <= margin * slo_tbt_s:
            best = max(best, tau)
    if not best:
        raise ConfigError(
            f"--slo-tbt-ms {slo_tbt_s * 1e3:g} is shorter than every step with {num_decodes} "
            f"decodes (the shortest takes {shortest_s * 1e3:.3g} ms): raise it, or lower "
            "--max-num-seqs or --max-model-len"
        )
    return best


def decode_step(num_decodes: int, decode_context: int, num_rows_bucket: int) -> StepFeatures:
    """Decodes alone, in a step of that bucket."""
    return StepFeatures(
        num_decodes, num_rows_bucket, num_decodes, num_decodes, decode_context, 0, 0, 0.0
    )


def smallest_bucket(buckets: Sequence[int], num_rows: int) -> int:
    """The first of the ascending `buckets` with at least `num_rows` rows.

    Raises ValueError if there is none.
    """
    for bucket in buckets:
        if bucket >= num_rows:
            return bucket
    raise ValueError(f"no bucket of {tuple(buckets)} holds {num_rows} rows")
