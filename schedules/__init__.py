"""Learning-rate schedules for optax: Knee, the usual ones, and a rate that tunes itself.

Imports jax and optax alone. `knee` and `make_schedule` give plain optax schedules;
`lr_tuner` is the last part of an optax chain, with a probe step beside the train step.
"""

from __future__ import annotations

from schedules.config import Kind, ScheduleConfig
from schedules.errors import ScheduleError
from schedules.factory import make_schedule, rewarmed
from schedules.parabola import Parabola, fit_parabola
from schedules.probe import (
    current_lr,
    direction_of,
    path_direction,
    probe_direction,
    probe_positions,
    probe_step,
    record_losses,
    trial_params,
    trial_rates,
)
from schedules.trapezoid import knee
from schedules.tuner import lr_tuner
from schedules.tuner_config import TunerConfig, Variant
from schedules.tuner_state import TunerState, tuner_state

__all__ = [
    "Kind",
    "Parabola",
    "ScheduleConfig",
    "ScheduleError",
    "TunerConfig",
    "TunerState",
    "Variant",
    "current_lr",
    "direction_of",
    "fit_parabola",
    "knee",
    "lr_tuner",
    "make_schedule",
    "path_direction",
    "probe_direction",
    "probe_positions",
    "probe_step",
    "record_losses",
    "rewarmed",
    "trial_params",
    "trial_rates",
    "tuner_state",
]
