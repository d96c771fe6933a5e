"""The host's side of D replicas that run their plans in one step: packing and unpacking."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxserve.engine.compilation import Programs
from jaxserve.engine.plan import ReplicaPlans, StepPlan, StepResults
from jaxserve.engine.plan_packer import PackedPlan, PlanPacker
from jaxserve.engine.step import unpack_outputs

PackedStep = tuple[PackedPlan | None, ...]
"""Of each replica; None for one without a plan."""


AnyPlan = StepPlan | ReplicaPlans
"""A `StepPlan` is a step of the first replica."""


class ReplicaPackers:
    """The host's side of all replicas.

    Args:
        programs: compiled for them.
        num_replicas: D.
    """

    def __init__(self, programs: Programs, num_replicas: int) -> None:
        self._packers = [
            PlanPacker(programs.layouts, programs.load_layout, programs.mask_layout)
            for _ in range(num_replicas)
        ]

    def take(self, plan: AnyPlan) -> PackedStep:
        """Takes the plans' changes into the page tables, and packs them.

        Raises ValueError for a plan that no compiled step takes, before anything has changed.
        """
        plans = self._plans(plan)
        for packer, own in zip(self._packers, plans, strict=True):
            if own is not None:
                packer.check(own)
        return tuple(
            None if own is None else packer.take(own)
            for packer, own in zip(self._packers, plans, strict=True)
        )

    def loads(self, step: PackedStep) -> list[np.ndarray]:
        """The step's slot loads, int32 `[D, load_layout.size]` each."""
        count = max(0 if packed is None else len(packed.loads) for packed in step)
        return [
            np.stack(
                [packer.load(own, index) for packer, own in zip(self._packers, step, strict=True)]
            )
            for index in range(count)
        ]

    def mask_loads(self, step: PackedStep) -> list[np.ndarray]:
        """The step's loads of masks, int32 `[D, mask_layout.size]` each."""
        count = max(0 if packed is None else len(packed.mask_loads) for packed in step)
        return [
            np.stack(
                [
                    packer.mask_load(own, index)
                    for packer, own in zip(self._packers, step, strict=True)
                ]
            )
            for index in range(count)
        ]

    def vectors(self, stages: Sequence[PackedStep | None], num_rows: int) -> np.ndarray:
        """int32 `[D, P, layout.size]`: what each stage of each replica computes."""
        return np.stack(
            [
                [
                    packer.vector(None if step is None else step[replica], num_rows)
                    for step in stages
                ]
                for replica, packer in enumerate(self._packers)
            ]
        )

    def _plans(self, plan: AnyPlan) -> Sequence[StepPlan | None]:
        if isinstance(plan, ReplicaPlans):
            return plan.plans
        return [plan, *[None] * (len(self._packers) - 1)]


def num_step_rows(step: PackedStep) -> int:
    """The smallest bucket that holds every replica's plan."""
    return max(packed.plan.num_rows_bucket for packed in step if packed is not None)


def unpack_results(
    plan: AnyPlan, outputs: np.ndarray
) -> StepResults | tuple[StepResults | None, ...]:
    """The host's view of outputs `[D, N, 3 + 2 * num_top]`, or without D on one device: one
    result, or one for each replica."""
    outputs = outputs.reshape(-1, *outputs.shape[-2:])
    if isinstance(plan, StepPlan):
        return unpack_outputs(plan.step_id, outputs[0], plan.num_sample_rows)
    return tuple(
        None if own is None else unpack_outputs(own.step_id, rows, own.num_sample_rows)
        for own, rows in zip(plan.plans, outputs, strict=True)
    )
