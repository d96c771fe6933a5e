"""PlanPacker: one replica's page table on the host, and its plans as vectors for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxserve.engine.plan import StepPlan
from jaxserve.engine.slots import SlotLoadLayout
from jaxserve.engine.step_inputs import StepLayout


class PlanPacker:
    """Follows a replica's plans in order.

    Args:
        layouts: bucket (rows) -> shapes of its step.
        load_layout: shape of a slot load.
    """

    def __init__(self, layouts: Mapping[int, StepLayout], load_layout: SlotLoadLayout) -> None:
        self._layouts = layouts
        self._load_layout = load_layout
        layout = next(iter(layouts.values()))
        # Row S and every unused entry name the spare page.
        self._spare_page = layout.num_pages
        self._page_table = np.full(
            (layout.num_slots + 1, layout.page_table_width), self._spare_page, np.int32
        )
        self._num_slot_pages = [0] * layout.num_slots

    def check(self, plan: StepPlan) -> None:
        """Raises ValueError for a plan that no compiled step takes."""
        if plan.num_rows_bucket not in self._layouts:
            raise ValueError(
                f"no step of {plan.num_rows_bucket} rows was compiled; "
                f"there are {sorted(self._layouts)}"
            )
        layout = self._layouts[plan.num_rows_bucket]
        if plan.num_tokens > layout.num_rows or plan.num_sample_rows > layout.num_sample_rows:
            raise ValueError(f"plan {plan.step_id} does not fit its bucket")

    def advance(self, plan: StepPlan) -> Sequence[np.ndarray]:
        """Takes the plan's changes into the page table. Returns its slot loads, int32
        `[load_layout.size]` each."""
        loads = []
        for load in plan.slot_loads:
            self._num_slot_pages[load.slot] = 0
            self._page_table[load.slot] = self._spare_page
            loads.append(self._load_layout.pack(load))
        for chunk in plan.chunks:
            if chunk.new_pages:
                held = self._num_slot_pages[chunk.slot]
                end = held + len(chunk.new_pages)
                self._page_table[chunk.slot, held:end] = chunk.new_pages
                self._num_slot_pages[chunk.slot] = end
        return loads

    def pack(self, plan: StepPlan, num_rows: int) -> np.ndarray:
        """int32 `[layout.size]` of a plan, by the page table as it is now, for the step of
        `num_rows` rows, which may be larger than the plan's own bucket."""
        return self._layouts[num_rows].pack(plan, self._page_table)

    def pack_nothing(self, num_rows: int) -> np.ndarray:
        """The vector of a replica or a stage that has no plan: padding alone."""
        return self._layouts[num_rows].pack(_NOTHING, self._page_table)

    def load_nothing(self) -> np.ndarray:
        """The slot load of a replica that has none: for a slot that does not exist."""
        vector = np.zeros(self._load_layout.size, np.int32)
        self._load_layout.views(vector)["scalars"][0] = len(self._num_slot_pages)
        return vector


_NOTHING = StepPlan(step_id=-1, num_rows_bucket=0, decodes=(), prefills=())
