"""How a learning rate is tuned while it is used."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from schedules.errors import ScheduleError

Variant = Literal["auto", "explore_exploit", "greedy", "running_max"]


@dataclass(frozen=True, kw_only=True)
class TunerConfig:
    """Settings of `lr_tuner`, `probe_step` and `probe_positions`: give all three the same.

    Attributes:
        total_steps: Updates of the whole run.
        initial_lr: Rate of the first update. It may be far too small: the rate doubles
            with each probe until the loss says otherwise.
        variant: `auto`, `explore_exploit`, or one of the negative controls `greedy` and
            `running_max`, which are here to be measured and not to be used.
        probe_every: Updates between probes, over which their batches are spread; unless given,
            so many that 24 probes fit into the longest ramp.
        rate_multiples: Rates tried by a probe, in terms of the current one; from 0 upwards.
        num_batches: Independent batches that a probe averages over.
        max_lr: The rate is never above it.
        max_growth: Largest change of the rate by one probe, up or down.
        min_r_squared: Share of the losses' variance that the parabola must explain.
        min_estimates: Optimal rates to have seen before their median counts; with so many,
            auto ends its ramp.
        settled_vertex: auto: the rate to hold is the one whose optimum is this multiple of it.
        vertex_per_doubling: auto: so much more or less of that multiple doubles or halves the rate.
            On networks it falls by about 0.17 as the rate doubles, on a quadratic by 0.47; in
            between, the rate settles on both without swinging.
        min_ramp_fraction: auto: share of the run before which the ramp does not end: a fresh
            network bears rates that it no longer bears a little later.
        max_ramp_fraction: auto: share of the run after which the ramp ends in any case.
        explore_fraction: Share of the run at the peak (auto), or spent exploring (others).
        rollback_factor: Three train losses in a row above this multiple of their recent median
            are a spike, which halves the rate.
        loss_tolerance: Share by which the mean train loss may have risen since the last probe
            and the rate still grow.

    Raises:
        ScheduleError: A value is out of its range.
    """

    total_steps: int
    initial_lr: float
    variant: Variant = "auto"
    probe_every: int | None = None
    rate_multiples: tuple[float, ...] = (0.0, 0.5, 1.0, 2.0)
    num_batches: int = 1
    max_lr: float = 1.0
    max_growth: float = 2.0
    min_r_squared: float = 0.5
    min_estimates: int = 6
    settled_vertex: float = 0.68
    vertex_per_doubling: float = 0.34
    min_ramp_fraction: float = 0.1
    max_ramp_fraction: float = 0.2
    explore_fraction: float = 0.5
    rollback_factor: float = 2.0
    loss_tolerance: float = 0.05

    def __post_init__(self) -> None:
        self._require("total_steps", self.total_steps >= 1, "at least 1")
        self._require("max_lr", 0 < self.max_lr < math.inf, "above 0")
        self._require("initial_lr", 0 < self.initial_lr <= self.max_lr, "above 0, at most max_lr")
        variants = ("auto", "explore_exploit", "greedy", "running_max")
        self._require("variant", self.variant in variants, f"one of {', '.join(variants)}")
        self._require("probe_every", self.probe_every is None or self.probe_every >= 1, ">= 1")
        multiples = self.rate_multiples
        self._require(
            "rate_multiples",
            len(multiples) >= 4
            and multiples[0] == 0
            and list(multiples) == sorted(set(multiples))
            and multiples[-1] > 1,
            "four or more rising numbers from 0 to above 1 "
            "(a parabola through three points leaves no residual to test)",
        )
        self._require("num_batches", self.num_batches >= 1, "at least 1")
        self._require("max_growth", 1 < self.max_growth <= 2, "above 1, at most 2")
        self._require("min_r_squared", 0 <= self.min_r_squared < 1, "0 to below 1")
        self._require("min_estimates", 1 <= self.min_estimates <= 16, "1 to 16")
        self._require("max_ramp_fraction", 0 < self.max_ramp_fraction <= 1, "above 0, at most 1")
        is_fraction = 0 <= self.min_ramp_fraction <= self.max_ramp_fraction
        self._require("min_ramp_fraction", is_fraction, "0 to max_ramp_fraction")
        in_reach = 0.5 < self.settled_vertex < multiples[-1]
        self._require("settled_vertex", in_reach, "0.5 to the largest of rate_multiples")
        self._require("vertex_per_doubling", self.vertex_per_doubling > 0, "above 0")
        self._require("explore_fraction", 0 <= self.explore_fraction <= 1, "0 to 1")
        self._require("rollback_factor", self.rollback_factor > 1, "above 1")
        self._require("loss_tolerance", self.loss_tolerance >= 0, "at least 0")

    def _require(self, name: str, holds: bool, what: str) -> None:
        if not holds:
            raise ScheduleError(f"{name} is {getattr(self, name)!r}; it must be {what}")

    @property
    def probe_interval(self) -> int:
        """Updates between probes."""
        if self.probe_every is not None:
            return self.probe_every
        return max(1, round(self.total_steps * self.max_ramp_fraction / 24))

    @property
    def batch_interval(self) -> int:
        """Updates between the batches of a probe."""
        return max(1, self.probe_interval // self.num_batches)

    @property
    def min_ramp_steps(self) -> int:
        """auto: updates before which the ramp does not end by itself."""
        return round(self.total_steps * self.min_ramp_fraction)

    @property
    def max_ramp_steps(self) -> int:
        """auto: updates after which the ramp ends in any case."""
        return max(1, round(self.total_steps * self.max_ramp_fraction))

    @property
    def explore_steps(self) -> int:
        """Updates at the peak (auto), or spent exploring (others)."""
        return round(self.total_steps * self.explore_fraction)

    @property
    def is_guarded(self) -> bool:
        """Whether the rules that keep the rate from running away apply: not to the controls."""
        return self.variant in ("auto", "explore_exploit")
