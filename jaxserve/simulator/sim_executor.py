"""SimExecutor: an `Executor` whose device is a cost model and a virtual clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxserve.engine.plan import StepPlan, StepResults
from jaxserve.engine.step_features import StepFeatures
from jaxserve.simulator.clock import VirtualClock
from jaxserve.simulator.cost_models.base import CostModel

StageTimes = Callable[[StepPlan], tuple[float, float]]
"""A plan's seconds in each stage, and between two stages."""
ResultsOf = Callable[[StepPlan], StepResults]
"""What a step gives."""


_NO_LOGPROBS = np.zeros(0, np.float32)
_NO_IDS = np.zeros(0, np.int32)


class SimStep(NamedTuple):
    """When a step ran: kept for timelines and for looking at bubbles."""

    plan: StepPlan
    stage_start_s: tuple[float, ...]
    stage_s: float
    """How long each stage was busy with it."""
    bubble_s: float
    """Time that stages idled just before it, once the pipe was primed."""

    @property
    def end_s(self) -> float:
        return self.stage_start_s[-1] + self.stage_s


@dataclass(slots=True)
class SimStats:
    """What the simulated device did."""

    num_steps: int = 0
    busy_s: float = 0.0
    """Of one stage."""
    bubble_s: float = 0.0
    """Of all stages."""
    steps: list[SimStep] | None = None
    """Every step, if they are recorded."""
    request_bubble_s: dict[str, float] = field(default_factory=dict)
    """Stage idle time just before a request's micro-batches, summed; only
    with more than one stage."""


def modelled(cost: CostModel) -> StageTimes:
    """Times from a cost model."""

    def stage_times(plan: StepPlan) -> tuple[float, float]:
        step = StepFeatures.of(plan)
        return cost.predict_s(step), cost.transfer_s(step.num_tokens)

    return stage_times


class ZeroTokens:
    """Every sampled token is 0, without logprobs: arrays are made once a length."""

    def __init__(self) -> None:
        self._token_ids: dict[int, np.ndarray] = {}

    def __call__(self, plan: StepPlan) -> StepResults:
        num_rows = plan.num_sample_rows
        if num_rows not in self._token_ids:
            self._token_ids[num_rows] = np.zeros(num_rows, np.int32)
        return StepResults(
            step_id=plan.step_id,
            token_ids=self._token_ids[num_rows],
            logprobs=_NO_LOGPROBS,
            ranks=_NO_IDS,
            top_ids=_NO_IDS,
            top_logprobs=_NO_LOGPROBS,
        )


class SimExecutor:
    """Pipeline stages in a row, each first in, first out.

    A step enters a stage when it has left the one before (and was handed
    over) and the stage is free. `next_completion` moves the clock.

    Args:
        clock: the clock that the engine's loop reads too.
        stage_times: what a plan takes in each stage.
        num_stages: pipeline stages.
        depth: most steps in flight; by default one a stage.
        results_of: what steps give; by default token 0 for every sample.
        record_steps: keep every step in `stats.steps`.
    """

    def __init__(
        self,
        clock: VirtualClock,
        stage_times: StageTimes,
        *,
        num_stages: int = 1,
        depth: int | None = None,
        results_of: ResultsOf | None = None,
        record_steps: bool = False,
    ) -> None:
        self.depth = num_stages if depth is None else depth
        self.stats = SimStats(steps=[] if record_steps else None)
        self._clock = clock
        self._stage_times = stage_times
        self._results_of = results_of or ZeroTokens()
        self._stage_free_s: list[float | None] = [None] * num_stages
        self._in_flight: deque[tuple[float, StepPlan]] = deque()

    @property
    def next_completion_s(self) -> float | None:
        """When the oldest step in flight is done; None if nothing is."""
        return self._in_flight[0][0] if self._in_flight else None

    def can_accept(self) -> bool:
        return len(self._in_flight) < self.depth

    def submit(self, plan: StepPlan) -> None:
        stage_s, transfer_s = self._stage_times(plan)
        ready_s = self._clock.now_s
        starts = []
        bubble_s = 0.0
        for stage, free_s in enumerate(self._stage_free_s):
            start_s = ready_s if free_s is None else max(ready_s, free_s)
            # Before its first step a stage is not idle, the pipe is filling.
            bubble_s += 0.0 if free_s is None else start_s - free_s
            starts.append(start_s)
            self._stage_free_s[stage] = start_s + stage_s
            ready_s = start_s + stage_s + transfer_s
        self._in_flight.append((ready_s - transfer_s, plan))
        self._count(SimStep(plan, tuple(starts), stage_s, bubble_s))

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        if not self._in_flight:
            raise LookupError("nothing is in flight")
        end_s, plan = self._in_flight.popleft()
        self._clock.advance_to(end_s)
        return plan, self._results_of(plan)

    def _count(self, step: SimStep) -> None:
        stats = self.stats
        stats.num_steps += 1
        stats.busy_s += step.stage_s
        stats.bubble_s += step.bubble_s
        if stats.steps is not None:
            stats.steps.append(step)
        if len(step.stage_start_s) > 1:
            bubbles = stats.request_bubble_s
            for chunk in step.plan.chunks:
                request_id = chunk.request_id
                bubbles[request_id] = bubbles.get(request_id, 0.0) + step.bubble_s
