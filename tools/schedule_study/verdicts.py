"""What the runs show, held against what was demanded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tools.schedule_study.statistics import Mean, mean_of, paired, steps_to_reach


@dataclass(frozen=True)
class Check:
    """A demand: `value.mean` is to be at most `limit`."""

    demand: str
    value: Mean
    limit: float

    @property
    def holds(self) -> bool:
        return self.value.mean <= self.limit

    @property
    def verdict(self) -> str:
        """Also says when the demand holds for the mean, but not for the whole interval."""
        if not self.holds:
            return "MISSED"
        return "holds" if self.value.high <= self.limit else "holds for the mean"

    def line(self) -> str:
        """One line of text."""
        value = self.value
        interval = f"{value.low:.4f} to {value.high:.4f}"
        return f"{self.demand}: {value.mean:.4f} ({interval}), at most {self.limit:g}"


def checks_of(char: dict[str, Any]) -> list[Check]:
    """Of the study on text."""
    plan = char["plan"]
    whole = plan["num_steps"]
    cosine = losses_of(char, f"cosine {whole}")
    full = losses_of(char, f"knee {whole}")
    tuned = {steps: losses_of(char, f"knee {steps}") for steps in (*plan["budgets"], whole)}
    checks = [
        Check("Knee less cosine, both tuned, same budget", paired(full, cosine), 0.0),
        Check(
            "steps of Knee to tuned cosine's loss, share",
            scaled(steps_to_reach(cosine, tuned), 1 / whole),
            0.92,
        ),
        *(
            _at_equal_peak(char, peak, budgets)
            for peak, budgets in zip(plan["equal_peaks"], plan["equal_budgets"], strict=True)
        ),
    ]
    for rate in plan["initial_rates"]:
        label = f"auto from {rate:g}"
        runs = char["runs"][label]
        difference = paired(losses_of(char, label), cosine)
        checks += [
            Check(f"{label} less tuned cosine", difference, 0.01),
            Check(f"{label}: overhead in passes", _mean(runs, "overhead_by_passes"), 0.03),
            Check(f"{label}: overhead in time", _mean(runs, "overhead_by_time"), 0.03),
        ]
    return checks


def _at_equal_peak(char: dict[str, Any], peak: float, budgets: Sequence[int]) -> Check:
    """A peak may be one that tuning finds, too: the demand's name then says whose."""
    whole = char["plan"]["num_steps"]
    knee = {steps: losses_of(char, f"knee at {peak:g} {steps}") for steps in (*budgets, whole)}
    cosine = losses_of(char, f"cosine at {peak:g} {whole}")
    owners = [kind for kind in ("cosine", "knee") if char["peaks"][kind] == peak]
    whose = f"the tuned peak of {' and '.join(owners)}" if owners else "tuned for neither"
    return Check(
        f"steps of Knee to cosine's loss, both with a peak of {peak:g} ({whose}), share",
        scaled(steps_to_reach(cosine, knee), 1 / whole),
        0.82,
    )


def losses_of(char: dict[str, Any], label: str) -> np.ndarray:
    """Held-out losses by seed."""
    return np.asarray([run["held_out_loss"] for run in char["runs"][label]])


def scaled(value: Mean, factor: float) -> Mean:
    """`value` in another unit."""
    return Mean(value.mean * factor, value.low * factor, value.high * factor, value.num_values)


def _mean(runs: Sequence[dict[str, Any]], name: str) -> Mean:
    return mean_of([run[name] for run in runs])
