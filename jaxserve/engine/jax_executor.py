"""JaxExecutor: runs plans on the device, two deep.

The hot path calls compiled objects only. Per step: one host-to-device
transfer, one call, one device-to-host copy.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import jax

from jaxserve.engine.compilation import Programs
from jaxserve.engine.replicas import AnyPlan, ReplicaPackers, num_step_rows, unpack_results
from jaxserve.engine.step_device import StepDevice


class JaxExecutor:
    """Implements `Executor`, for plans of one replica or of several.

    Args:
        device: owns the KV pool and the slots' state.
        depth: plans in flight; 1 is synchronous.
    """

    def __init__(self, device: StepDevice, *, depth: int = 2) -> None:
        self.depth = depth
        self.device = device
        self._in_flight: deque[tuple[AnyPlan, jax.Array]] = deque()
        self._packers = ReplicaPackers(device.programs, device.programs.num_replicas)
        layout = next(iter(device.programs.layouts.values()))
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

    def submit(self, plan: AnyPlan) -> None:
        """Dispatches the plan. Raises ValueError for a bucket that was not
        compiled or a full executor, before anything has changed."""
        if not self.can_accept():
            raise ValueError(f"{self.depth} plans are in flight already")
        step = self._packers.take(plan)
        for vectors in self._packers.loads(step):
            self.device.load_slot(vectors)
        for vectors in self._packers.mask_loads(step):
            self.device.load_masks(vectors)
        num_rows = num_step_rows(step)
        outputs = self.device.step(num_rows, self._packers.vectors([step], num_rows))
        self._in_flight.append((plan, outputs))

    def restart(self) -> None:
        """Forgets the plans in flight and what the device keeps for requests.

        Raises StepOutOfMemory if there is no memory for the KV pool.
        """
        self._in_flight.clear()
        self._packers = ReplicaPackers(self.programs, self.programs.num_replicas)
        self.device.renew()

    def next_completion(self) -> tuple[Any, Any]:
        """The oldest plan with its `StepResults`, or a tuple of them for `ReplicaPlans`."""
        if not self._in_flight:
            raise LookupError("no plan is in flight")
        plan, outputs = self._in_flight[0]
        host = self.device.fetch(outputs)
        self._in_flight.popleft()
        return plan, unpack_results(plan, host)
