"""PipelineExecutor: runs plans through the stages of a pipeline, one in each.

A *tick* is one call of a compiled program, in which every stage computes its layers of the plan
that it holds and hands the rows on. A plan submitted at tick k leaves the last stage at tick
k + P - 1. Stages without a plan compute padding.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import jax

from jaxserve.engine.compilation import Programs
from jaxserve.engine.replicas import (
    AnyPlan,
    PackedStep,
    ReplicaPackers,
    num_step_rows,
    unpack_results,
)
from jaxserve.engine.step_device import StepDevice


@dataclass(slots=True)
class PipelineStats:
    """What the stages did, in ticks and rows. All stages take as long as the largest one's rows."""

    num_ticks: int = 0
    num_micro_batches: int = 0
    num_empty_stages: int = 0
    """Summed over ticks: stages that held no plan, while another one did."""
    num_stage_rows: int = 0
    """Rows that all stages computed."""
    num_idle_rows: int = 0
    """Of these, rows beyond the bucket of the stage's own plan: the pipeline's bubbles."""

    @property
    def idle_rows_per_micro_batch(self) -> float:
        return self.num_idle_rows / max(1, self.num_micro_batches)


class PipelineExecutor:
    """Implements `Executor`, `depth` being the number of stages.

    Args:
        device: with P stages.
    """

    def __init__(self, device: StepDevice) -> None:
        programs = device.programs
        self.depth = programs.num_stages
        self.device = device
        self.stats = PipelineStats()
        self._packers = ReplicaPackers(programs, programs.num_replicas)
        self._stages: list[PackedStep | None] = [None] * self.depth
        self._plans: deque[AnyPlan] = deque()
        """In flight, oldest first."""
        self._outputs: deque[jax.Array] = deque()
        """Of the oldest of them, whose last stage has been dispatched."""

    @property
    def programs(self) -> Programs:
        return self.device.programs

    @property
    def num_in_flight(self) -> int:
        return len(self._plans)

    def can_accept(self) -> bool:
        return len(self._plans) < self.depth

    def submit(self, plan: AnyPlan) -> None:
        """Dispatches a tick in which the plan enters. Raises ValueError as `JaxExecutor` does."""
        if not self.can_accept():
            raise ValueError(f"{self.depth} plans are in flight already")
        step = self._packers.take(plan)
        # A slot is free again when all plans with it have left, so none in flight reads it.
        for vectors in self._packers.loads(step):
            self.device.load_slot(vectors)
        # Nor does one in flight sample from a slot whose next mask depends on what it samples.
        for vectors in self._packers.mask_loads(step):
            self.device.load_masks(vectors)
        self._plans.append(plan)
        self.stats.num_micro_batches += 1
        self._tick(step)

    def restart(self) -> None:
        """As `JaxExecutor.restart`."""
        self._stages = [None] * self.depth
        self._plans.clear()
        self._outputs.clear()
        self._packers = ReplicaPackers(self.programs, self.programs.num_replicas)
        self.device.renew()

    def next_completion(self) -> tuple[Any, Any]:
        """The oldest plan with its results, as `JaxExecutor` gives them.

        If nothing has pushed it through the pipe, empty plans follow it.
        """
        if not self._plans:
            raise LookupError("no plan is in flight")
        while not self._outputs:
            self._tick(None)
        host = self.device.fetch(self._outputs[0])
        self._outputs.popleft()
        plan = self._plans.popleft()
        return plan, unpack_results(plan, host)

    def _tick(self, entering: PackedStep | None) -> None:
        self._stages = [entering, *self._stages[:-1]]
        own_rows = [0 if step is None else num_step_rows(step) for step in self._stages]
        num_rows = max(own_rows)
        outputs = self.device.step(num_rows, self._packers.vectors(self._stages, num_rows))
        if self._stages[-1] is not None:
            self._outputs.append(outputs)
        stats = self.stats
        stats.num_ticks += 1
        stats.num_empty_stages += own_rows.count(0)
        stats.num_stage_rows += num_rows * self.depth
        stats.num_idle_rows += num_rows * self.depth - sum(own_rows)
