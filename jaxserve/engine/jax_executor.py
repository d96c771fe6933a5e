"""JaxExecutor: runs plans on the device, two deep.

The hot path calls compiled objects only. Per step: one host-to-device
transfer, one call, one device-to-host copy.
"""

from __future__ import annotations

from collections import deque

import jax
import numpy as np

from jaxserve.engine.compilation import Programs
from jaxserve.engine.plan import StepPlan, StepResults
from jaxserve.engine.slots import SlotState
from jaxserve.engine.step import Params, unpack_outputs


class JaxExecutor:
    """Implements `Executor`. Owns the KV pool and the slots' state.

    Args:
        programs: compiled ahead of time.
        params: weights on the device; an argument of the step, so a swap
            never recompiles.
        kv_pool: `[L, P + 1, page_size, 2, K, D]`; donated to every step.
        slots: donated to every step.
        depth: plans in flight; 1 is synchronous.
    """

    def __init__(
        self,
        programs: Programs,
        params: Params,
        kv_pool: jax.Array,
        slots: SlotState,
        *,
        depth: int = 2,
    ) -> None:
        self.depth = depth
        self.params = params
        self.kv_pool = kv_pool
        self.slots = slots
        self.programs = programs
        self._in_flight: deque[tuple[StepPlan, jax.Array]] = deque()
        self._device = next(iter(kv_pool.devices()))
        layout = next(iter(programs.layouts.values()))
        self.tiling = layout.tiling
        self.num_pages = layout.num_pages
        # Row S and every unused entry name the spare page.
        self._spare_page = layout.num_pages
        self._page_table = np.full(
            (layout.num_slots + 1, layout.page_table_width), self._spare_page, np.int32
        )
        self._num_slot_pages = [0] * layout.num_slots

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
        if plan.num_rows_bucket not in self.programs.steps:
            raise ValueError(
                f"no step of {plan.num_rows_bucket} rows was compiled; "
                f"there are {sorted(self.programs.steps)}"
            )
        layout = self.programs.layouts[plan.num_rows_bucket]
        if plan.num_tokens > layout.num_rows or plan.num_sample_rows > layout.num_sample_rows:
            raise ValueError(f"plan {plan.step_id} does not fit its bucket")
        for load in plan.slot_loads:
            self._num_slot_pages[load.slot] = 0
            self._page_table[load.slot] = self._spare_page
            self.load_slot(self.programs.load_layout.pack(load))
        for chunk in plan.chunks:
            if chunk.new_pages:
                held = self._num_slot_pages[chunk.slot]
                end = held + len(chunk.new_pages)
                self._page_table[chunk.slot, held:end] = chunk.new_pages
                self._num_slot_pages[chunk.slot] = end
        outputs = self.step(plan.num_rows_bucket, layout.pack(plan, self._page_table))
        outputs.copy_to_host_async()
        self._in_flight.append((plan, outputs))

    def load_slot(self, vector: np.ndarray) -> None:
        """Dispatches a slot's load; `vector` is int32 `[programs.load_layout.size]`.

        With `step` this is all that touches the device: whoever calls the two with the same
        vectors in the same order does the same work.
        """
        self.slots = self.programs.load_slot(self.slots, self._put(vector))

    def step(self, num_rows: int, vector: np.ndarray) -> jax.Array:
        """Dispatches the step of a bucket; `vector` is int32 `[layout.size]` of that bucket.
        Returns its outputs, see `unpack_outputs`."""
        step = self.programs.steps[num_rows]
        outputs: jax.Array
        self.kv_pool, self.slots, outputs = step(
            self.params, self.kv_pool, self.slots, self._put(vector)
        )
        return outputs

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        if not self._in_flight:
            raise LookupError("no plan is in flight")
        plan, outputs = self._in_flight[0]
        host = np.asarray(outputs)
        self._in_flight.popleft()
        return plan, unpack_outputs(plan.step_id, host, plan.num_sample_rows)

    def _put(self, vector: np.ndarray) -> jax.Array:
        array: jax.Array = jax.device_put(vector, self._device)
        return array
