"""JaxExecutor: runs plans on the device, two deep.

The hot path calls compiled objects only. Per step: one host-to-device
transfer, one call, one device-to-host copy.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

import jax

from jaxserve.engine.plan import StepPlan, StepResults
from jaxserve.engine.plan_packer import PlanPacker
from jaxserve.engine.step import unpack_outputs
from jaxserve.engine.step_device import StepDevice

if TYPE_CHECKING:
    from jaxserve.engine.compilation import Programs


class JaxExecutor:
    """Implements `Executor`, for one replica.

    Args:
        device: owns the KV pool and the slots' state.
        depth: plans in flight; 1 is synchronous.
    """

    def __init__(self, device: StepDevice, *, depth: int = 2) -> None:
        self.depth = depth
        self.device = device
        self._in_flight: deque[tuple[StepPlan, jax.Array]] = deque()
        layouts = device.programs.layouts
        self._packer = PlanPacker(layouts, device.programs.load_layout)
        layout = next(iter(layouts.values()))
        self.tiling = layout.tiling
        self.num_pages = layout.num_pages

    @property
    def programs(self) -> Programs:
        return self.device.programs

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def can_accept(self) -> bool:
        return len(self._in_flight) < self.depth

    def submit(self, plan: StepPlan) -> None:
        """Dispatches the plan. Raises ValueError for a bucket that was not
        compiled or a full executor, before anything has changed."""
        if not self.can_accept():
            raise ValueError(f"{self.depth} plans are in flight already")
        self._packer.check(plan)
        for vector in self._packer.advance(plan):
            self.device.load_slot(vector[None])
        vector = self._packer.pack(plan, plan.num_rows_bucket)
        outputs = self.device.step(plan.num_rows_bucket, vector[None, None])
        self._in_flight.append((plan, outputs))

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        if not self._in_flight:
            raise LookupError("no plan is in flight")
        plan, outputs = self._in_flight[0]
        host = self.device.fetch(outputs)
        self._in_flight.popleft()
        rows = host.reshape(host.shape[-2:])
        return plan, unpack_outputs(plan.step_id, rows, plan.num_sample_rows)
