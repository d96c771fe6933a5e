"""CostModel: from a step's counts to seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from jaxserve.engine.step_features import StepFeatures


class StageCost(NamedTuple):
    """Seconds of one pipeline stage for one step, by what takes them."""

    linear_s: float
    """Matrix products of the layers."""
    elementwise_s: float
    """Norms, rotations, activations, residual sums."""
    attention_s: float
    all_reduce_s: float
    host_s: float

    @property
    def total_s(self) -> float:
        return (
            self.linear_s + self.elementwise_s + self.attention_s + self.all_reduce_s + self.host_s
        )


@dataclass(frozen=True, slots=True)
class HostCost:
    """Time on the host that a step pays, in every stage."""

    per_step_s: float = 0.005
    per_seq_s: float = 0.0001

    def seconds(self, num_seqs: int) -> float:
        return self.per_step_s + self.per_seq_s * num_seqs


NO_HOST_COST = HostCost(0.0, 0.0)


class CostModel(Protocol):
    """Stages are equal: each holds the same number of layers.

    `predict_s` makes every cost model a `StepCost`, which time budgets use.
    """

    def predict_s(self, step: StepFeatures) -> float:
        """Seconds that one stage takes for this step."""
        ...

    def stage_cost(self, step: StepFeatures) -> StageCost:
        """`predict_s` by what takes the time."""
        ...

    def transfer_s(self, num_rows: int) -> float:
        """Handing that many rows' activations to the next stage."""
        ...
