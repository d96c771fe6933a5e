"""What a measurement is worth: pass, fail, or void because the machine was busy."""

from __future__ import annotations

import os
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import psutil

from tools.policy_evaluation.operating_point import OperatingPoint
from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.steps import StepShape, time_steps

MAX_SPREAD = 0.25
"""(P90 - P10) / P50 of the calibration loop; above it nothing is concluded."""
MAX_FOREIGN_SHARE = 0.10
"""CPU time of other programs, as a share of the cores that are ours."""
STEADY_CONTEXT = 400
"""Tokens of a steady decode, where reference steps are timed."""


def reference_steps(point: OperatingPoint) -> Mapping[str, StepShape]:
    """A step of the whole token budget in the middle of a long prompt, one of the steady
    decodes alone, and a whole long prompt."""
    budget, steady = point.token_budget, point.num_steady
    return {
        "full": StepShape(budget, steady, STEADY_CONTEXT, budget - steady, point.long_prompt // 2),
        "decode": StepShape(
            min(rows for rows in point.buckets if rows >= steady), steady, STEADY_CONTEXT
        ),
        "whole": StepShape(max(point.buckets), chunk_tokens=point.long_prompt),
    }


@dataclass(frozen=True, slots=True)
class Check:
    """`value` must be at most (or at least) `limit`."""

    name: str
    value: float
    limit: float
    at_most: bool = True

    @property
    def holds(self) -> bool:
        return self.value <= self.limit if self.at_most else self.value >= self.limit


@dataclass(frozen=True, slots=True)
class Noise:
    """How quiet the machine was."""

    calibration_spread: float
    foreign_cpu_share: float
    load_average: float

    def void_reasons(self) -> list[str]:
        reasons = []
        if self.calibration_spread > MAX_SPREAD:
            reasons.append(
                f"the calibration loop spread by {self.calibration_spread:.0%} (at most "
                f"{MAX_SPREAD:.0%})"
            )
        if self.foreign_cpu_share > MAX_FOREIGN_SHARE:
            reasons.append(
                f"other programs took {self.foreign_cpu_share:.0%} of the CPU (at most "
                f"{MAX_FOREIGN_SHARE:.0%})"
            )
        return reasons


@dataclass(frozen=True, slots=True)
class Readings:
    """What a noise meter has read."""

    seconds: Mapping[str, Sequence[float]]
    """Of each reference step, one value a repeat."""
    full_ms_by_sample: Sequence[float]
    """Medians of the full step."""
    foreign_cpu_share: float
    load_average: float

    def median_s(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def noise(self) -> Noise:
        low, middle, high = np.percentile(self.seconds["full"], (10, 50, 90))
        return Noise(float((high - low) / middle), self.foreign_cpu_share, self.load_average)

    def reference_ms(self) -> dict[str, Any]:
        """Medians of all samples, and of the full step sample by sample."""
        medians = {f"{name}_step_ms": 1e3 * self.median_s(name) for name in self.seconds}
        return medians | {"full_step_ms_by_sample": list(self.full_ms_by_sample)}


def merged(readings: Sequence[Readings]) -> Readings:
    """One for several runs: all their times, and the worst of their loads."""
    return Readings(
        {
            name: [second for one in readings for second in one.seconds[name]]
            for name in readings[0].seconds
        },
        [median for one in readings for median in one.full_ms_by_sample],
        max(one.foreign_cpu_share for one in readings),
        max(one.load_average for one in readings),
    )


@dataclass(frozen=True, slots=True)
class Outcome:
    name: str
    checks: Sequence[Check]
    figures: dict[str, Any]
    noise: Noise
    void_reasons: Sequence[str] = ()
    """Beside those of the noise."""

    @property
    def verdict(self) -> str:
        """A run on a busy machine is void even if every check holds."""
        if self.noise.void_reasons() or self.void_reasons:
            return "void"
        return "pass" if all(check.holds for check in self.checks) else "fail"

    def values(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "verdict": self.verdict,
            "void_reasons": [*self.noise.void_reasons(), *self.void_reasons],
            "checks": [asdict(check) | {"holds": check.holds} for check in self.checks],
            "figures": self.figures,
            "noise": asdict(self.noise),
        }


def cpu_times_s(cores: Collection[int] | None = None) -> tuple[float, float]:
    """CPU seconds of `cores` (or all), and of this process and its children.

    What a hypervisor took from a core counts as seconds of the core.
    """
    busy_s = 0.0
    for number, core in enumerate(psutil.cpu_times(percpu=True)):
        if cores is None or number in cores:
            busy_s += core.user + core.nice + core.system + core.steal
    own_s = 0.0
    process = psutil.Process()
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        own_s += times.user + times.system
        if one is process:
            own_s += times.children_user + times.children_system
    return busy_s, own_s


def wait_until_quiet(
    cores: Collection[int], timeout_s: float, *, windows: int = 3, window_s: float = 2.0
) -> bool:
    """Until other programs are below the limit for some seconds; False if they never are."""
    end_s = time.monotonic() + timeout_s
    num_quiet = 0
    while num_quiet < windows:
        if time.monotonic() > end_s:
            return False
        before = cpu_times_s(cores)
        time.sleep(window_s)
        machine_s, own_s = (
            now - then for now, then in zip(cpu_times_s(cores), before, strict=True)
        )
        share = max(0.0, machine_s - own_s) / (window_s * len(cores))
        num_quiet = num_quiet + 1 if share <= MAX_FOREIGN_SHARE else 0
    return True


@dataclass(slots=True)
class NoiseMeter:
    """Times the same steps again and again between the measurements.

    `sample` runs three shapes; the spread is that of the full step, and their
    medians are the reference times of the run. Without `whole_repeats` it leaves out the
    whole prompt, which takes the longest.
    """

    rig: Rig
    _seconds: dict[str, list[float]] = field(default_factory=dict)
    _full_ms: list[float] = field(default_factory=list)
    _start_s: float = field(default_factory=time.monotonic)
    _start_cpu: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._start_cpu = cpu_times_s(self.rig.placement.all_cores)

    def sample(self, repeats: int = 12, *, whole_repeats: int = 2) -> None:
        steps = dict(reference_steps(self.rig.point))
        whole = {"whole": steps.pop("whole")}
        for shapes, times in ((steps, repeats), (whole, whole_repeats)):
            if not times:
                continue
            for name, seconds in time_steps(self.rig.executor, shapes, times).items():
                self._seconds.setdefault(name, []).extend(seconds.tolist())
                if name == "full":
                    self._full_ms.append(1e3 * float(np.median(seconds)))

    def median_s(self, name: str) -> float:
        return self.readings().median_s(name)

    def readings(self) -> Readings:
        cores = self.rig.placement.all_cores
        machine_s, own_s = (
            now - before for now, before in zip(cpu_times_s(cores), self._start_cpu, strict=True)
        )
        capacity_s = (time.monotonic() - self._start_s) * len(cores)
        return Readings(
            {name: list(seconds) for name, seconds in self._seconds.items()},
            list(self._full_ms),
            foreign_cpu_share=max(0.0, machine_s - own_s) / capacity_s,
            load_average=os.getloadavg()[0],
        )

    def noise(self) -> Noise:
        return self.readings().noise()

    def reference_ms(self) -> dict[str, Any]:
        return self.readings().reference_ms()
