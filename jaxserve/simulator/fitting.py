"""A step-cost model from steps that an engine recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from jaxserve.engine.step_cost import FittedStepCost, fit_step_cost
from jaxserve.engine.step_features import StepFeatures
from jaxserve.engine.step_log import read_step_log
from jaxserve.errors import ConfigError

MIN_STEPS = 8


@dataclass(frozen=True, slots=True)
class StepFit:
    """A model and how far it is off on steps that it has not seen."""

    model: FittedStepCost
    num_fitted: int
    held_out_error: np.ndarray
    """|predicted / measured - 1| of the steps held out."""

    @property
    def mape(self) -> float:
        """Mean absolute relative error."""
        return float(self.held_out_error.mean())

    def summary(self) -> dict[str, object]:
        return {
            "model": asdict(self.model),
            "num_steps_fitted": self.num_fitted,
            "num_steps_held_out": len(self.held_out_error),
            "mape": self.mape,
            "p90_error": float(np.percentile(self.held_out_error, 90)),
        }


def fit_step_log(path: Path) -> StepFit:
    """Raises ConfigError if the file can't be read or holds too few steps."""
    steps = read_step_log(path)
    if len(steps) < MIN_STEPS:
        raise ConfigError(
            f"{path} holds {len(steps)} steps; a cost model needs at least {MIN_STEPS}: record a "
            "longer run"
        )
    return fit_held_out(steps)


def fit_held_out(steps: Sequence[tuple[StepFeatures, float]]) -> StepFit:
    """Fits every even step and judges by the odd ones."""
    model = fit_step_cost(steps[::2])
    errors = [abs(model.predict_s(step) / measured_s - 1) for step, measured_s in steps[1::2]]
    return StepFit(model, len(steps[::2]), np.array(errors))
