"""Policy: in which order requests get into a step, and nothing else.

Memory, budgets, slots and positions are the draft's business, so a policy is
a few lines and can't break their rules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from jaxserve.engine.plan import StepPlan
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.draft import StepDraft
from jaxserve.engine.scheduler.rules import PolicyRules
from jaxserve.engine.scheduler.waiting import QueueKey
from jaxserve.errors import ConfigError


class Policy(ABC):
    """One instance belongs to one scheduler: some remember their last turn."""

    name: ClassVar[str]
    """Value of `--policy`."""
    rules: ClassVar[PolicyRules] = PolicyRules()

    @abstractmethod
    def fill(self, draft: StepDraft) -> None:
        """Adds chunks to an empty draft until nothing more should go in."""

    def max_step_rows(self, config: SchedulerConfig) -> int:
        """Rows of its largest step; a bucket must hold as many.

        Policies that put whole prompts into a step fill it up to here.
        """
        return config.token_budget

    queue_key: QueueKey | None = None
    """Order of the waiting requests of a class; None: first come, first served."""

    def committed(self, plan: StepPlan, step_s: float) -> None:  # noqa: B027
        """A step came back after it ran for `step_s` seconds."""

    def check(self, config: SchedulerConfig) -> int:
        """`max_step_rows`. Raises ConfigError if no bucket holds them."""
        num_rows = self.max_step_rows(config)
        if num_rows > config.buckets[-1]:
            raise ConfigError(
                f"--policy {self.name} puts whole prompts into a step, which takes up to "
                f"{num_rows} rows; the largest of --buckets is {config.buckets[-1]}: leave "
                "--buckets at auto, add that row count, or lower --max-model-len"
            )
        return num_rows


def longest_prefill(config: SchedulerConfig) -> int:
    """Tokens of the longest prefill: a token of output must still fit."""
    return config.max_model_len - 1
