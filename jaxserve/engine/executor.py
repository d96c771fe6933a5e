"""Executor: the seam between planning and computing.

The loop is the same for every executor: submit plans while it can accept,
then wait for the oldest one's results.
"""

from __future__ import annotations

from typing import Protocol

from jaxserve.engine.plan import StepPlan, StepResults


class StepOutOfMemory(RuntimeError):
    """The device had no memory for a step. What it kept for the steps in flight may be lost."""


class Executor(Protocol):
    """Runs plans in the order in which they are submitted."""

    depth: int
    """Most plans in flight at once."""

    def can_accept(self) -> bool:
        """Whether fewer than `depth` plans are in flight."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Starts a step and returns without waiting for it."""
        ...

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        """Waits for the oldest plan in flight. Raises LookupError if none is."""
        ...
