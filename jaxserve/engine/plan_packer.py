"""PlanPacker: one replica's page table on the host, and its plans as vectors for the device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.engine.mask_loads import MaskLoadLayout
from jaxserve.engine.plan import Decodes, StepPlan
from jaxserve.engine.slots import SlotLoadLayout
from jaxserve.engine.step_inputs import StepLayout


@dataclass(frozen=True, slots=True)
class PackedPlan:
    """A plan with the page table as it was when the plan was made."""

    plan: StepPlan
    loads: Sequence[np.ndarray]
    """Slot loads, int32 `[load_layout.size]` each."""
    mask_loads: Sequence[np.ndarray]
    """Loads of masks, int32 `[mask_layout.size]` each."""
    vector: np.ndarray
    """int32 `[layout.size]` of the plan's bucket."""


class PlanPacker:
    """Follows a replica's plans in order.

    Args:
        layouts: bucket (rows) -> shapes of its step.
        load_layout: shape of a slot load.
        mask_layout: shape of a load of masks.
    """

    def __init__(
        self,
        layouts: Mapping[int, StepLayout],
        load_layout: SlotLoadLayout,
        mask_layout: MaskLoadLayout,
    ) -> None:
        self._layouts = layouts
        self._load_layout = load_layout
        self._mask_layout = mask_layout
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

    def take(self, plan: StepPlan) -> PackedPlan:
        """Takes the plan's changes into the page table, and packs it."""
        loads = []
        for load in plan.slot_loads:
            self._num_slot_pages[load.slot] = 0
            self._page_table[load.slot] = self._spare_page
            loads.append(self._load_layout.pack(load))
        for slot, page_ids in plan.new_pages:
            held = self._num_slot_pages[slot]
            end = held + len(page_ids)
            self._page_table[slot, held:end] = page_ids
            self._num_slot_pages[slot] = end
        vector = self._layouts[plan.num_rows_bucket].pack(plan, self._page_table)
        return PackedPlan(plan, loads, tuple(self._mask_layout.vectors(plan.mask_loads)), vector)

    def vector(self, packed: PackedPlan | None, num_rows: int) -> np.ndarray:
        """int32 `[layout.size]` for the step of `num_rows` rows, which may be larger than the
        plan's own bucket; padding alone for None."""
        layout = self._layouts[num_rows]
        if packed is None:
            return layout.pack(_NOTHING, self._page_table)
        bucket = packed.plan.num_rows_bucket
        if bucket == num_rows:
            return packed.vector
        start, end = self._layouts[bucket].slices["page_table"]
        return layout.pack(packed.plan, packed.vector[start:end].reshape(self._page_table.shape))

    def load(self, packed: PackedPlan | None, index: int) -> np.ndarray:
        """int32 `[load_layout.size]` of the plan's load at `index`. Where there is none, one for
        a slot that does not exist, which is dropped."""
        if packed is not None and index < len(packed.loads):
            return packed.loads[index]
        vector = np.zeros(self._load_layout.size, np.int32)
        self._load_layout.views(vector)["scalars"][0] = len(self._num_slot_pages)
        return vector

    def mask_load(self, packed: PackedPlan | None, index: int) -> np.ndarray:
        """int32 `[mask_layout.size]` of the plan's load of masks at `index`; without any masks
        where there is none."""
        if packed is not None and index < len(packed.mask_loads):
            return packed.mask_loads[index]
        return self._mask_layout.pack(())


_NOTHING = StepPlan(step_id=-1, num_rows_bucket=0, decodes=Decodes(), prefills=())
