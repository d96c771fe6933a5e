"""Step log: what each step held and how long it took, as JSON lines.

One line a step: the fields of `StepFeatures` and `duration_s`. It feeds
`jaxserve simulate fit`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from jaxserve.engine.executor import Executor
from jaxserve.engine.plan import StepPlan, StepResults
from jaxserve.engine.step_features import StepFeatures
from jaxserve.errors import ConfigError


class CompletedStep(NamedTuple):
    """One step as the loop saw it."""

    plan: StepPlan
    results: StepResults
    submitted_s: float
    completed_s: float
    duration_s: float
    """From its submission, or the completion of the step before it if that
    was later, to its completion."""


class ObservedExecutor:
    """An executor that tells of each step that completes.

    Args:
        executor: does the work.
        clock: the loop's.
        observe: called from the loop's thread, after the step completed.
    """

    def __init__(
        self,
        executor: Executor,
        clock: Callable[[], float],
        observe: Callable[[CompletedStep], None],
    ) -> None:
        self.depth = executor.depth
        self._executor = executor
        self._clock = clock
        self._observe = observe
        self._submitted_s: dict[int, float] = {}
        self._last_completed_s = float("-inf")

    def can_accept(self) -> bool:
        return self._executor.can_accept()

    def submit(self, plan: StepPlan) -> None:
        self._submitted_s[plan.step_id] = self._clock()
        self._executor.submit(plan)

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        plan, results = self._executor.next_completion()
        completed_s = self._clock()
        submitted_s = self._submitted_s.pop(plan.step_id)
        duration_s = completed_s - max(submitted_s, self._last_completed_s)
        self._last_completed_s = completed_s
        self._observe(CompletedStep(plan, results, submitted_s, completed_s, duration_s))
        return plan, results


def step_log_writer(file: IO[str]) -> Callable[[CompletedStep], None]:
    """An `observe` for `ObservedExecutor` that writes a line a step."""

    def write(step: CompletedStep) -> None:
        record = StepFeatures.of(step.plan)._asdict() | {"duration_s": step.duration_s}
        file.write(json.dumps(record) + "\n")

    return write


def read_step_log(path: Path) -> list[tuple[StepFeatures, float]]:
    """Steps with their seconds. Raises ConfigError naming the bad line."""
    steps = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the step log {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            duration_s = float(record.pop("duration_s"))
            step = StepFeatures(**record)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(
                f"{path}, line {number} is no step: {error!r}; a line holds "
                f"{', '.join(StepFeatures._fields)} and duration_s"
            ) from error
        if duration_s <= 0:
            raise ConfigError(f"{path}, line {number}: duration_s must be positive")
        steps.append((step, duration_s))
    return steps
