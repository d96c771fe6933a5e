"""Which schedule a run follows, as values that can be written down and read back."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from schedules.errors import ScheduleError
from schedules.trapezoid import knee

Kind = Literal[
    "constant",
    "linear",
    "cosine",
    "polynomial",
    "knee",
    "wsd",
    "inverse_sqrt",
    "one_cycle",
    "piecewise",
]
Unit = Literal["steps", "tokens"]
Decay = Literal["linear", "cosine", "sqrt"]

_OPTIONS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "constant": ((), ()),
    "linear": (("total",), ("end_value",)),
    "cosine": (("total",), ("end_value",)),
    "polynomial": (("total", "power"), ("end_value",)),
    "knee": (("total",), ("end_value", "explore_fraction")),
    "wsd": (("total", "decay"), ("end_value", "decay_shape")),
    "inverse_sqrt": ((), ("timescale",)),
    "one_cycle": (("total",), ("end_value",)),
    "piecewise": (("boundaries", "factors"), ()),
}
"""Kind -> (options it needs, options it may have) of those not shared by all."""


def options_of(kind: Kind) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What a kind needs, and what it may have, of the options that not all kinds share."""
    return _OPTIONS[kind]


_LENGTHS = ("total", "warmup", "decay", "timescale", "rewarm", "boundaries", "rewarm_at")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """A learning-rate schedule. An option that the kind does not use is refused.

    Lengths are in `unit`. With `unit="tokens"` and `tokens_per_step`, the schedule
    is read with counts of steps, and lengths are rounded up to whole steps. With
    `unit="tokens"` alone, it is read with counts of tokens, for runs whose batch
    grows; give those as float32 or int64 once they may pass 2**31.

    Attributes:
        kind: The shape after the warm-up; `make_schedule` has the formulas.
        peak_value: The highest rate.
        total: Length of the run.
        unit: What lengths and counts are counted in.
        tokens_per_step: Tokens of one update.
        warmup: Length of the linear rise to the peak.
        init_value: Rate at count 0, if there is a warm-up; one_cycle: peak / 25 unless given.
        end_value: Rate at `total`, 0 unless given; one_cycle: `init_value` / 10,000 unless given.
        explore_fraction: knee: share of `total` at the peak, 0.5 unless given.
        decay: wsd: length of the fall, which ends at `total`.
        decay_shape: wsd: form of the fall, linear unless given.
        power: polynomial: the exponent.
        timescale: inverse_sqrt: the length after which the rate has fallen to peak / sqrt(2);
            the warm-up's unless given.
        boundaries: piecewise: counts at which the next factor begins.
        factors: piecewise: share of the peak from each boundary on.
        count_from: 0: the first update has the rate at count 0, as in optax. 1: that at count 1,
            so that a warm-up wastes no update and the last update has `end_value`.
        rewarm_at: Counts at which the run was resumed and the rate rises anew from 0.
        rewarm: Length of each such rise.

    Raises:
        ScheduleError: Options are missing, foreign to the kind, or do not fit together.
    """

    kind: Kind = "knee"
    peak_value: float
    total: int | None = None
    unit: Unit = "steps"
    tokens_per_step: int | None = None
    warmup: int = 0
    init_value: float | None = None
    end_value: float | None = None
    explore_fraction: float | None = None
    decay: int | None = None
    decay_shape: Decay | None = None
    power: float | None = None
    timescale: int | None = None
    boundaries: tuple[int, ...] | None = None
    factors: tuple[float, ...] | None = None
    count_from: int = 0
    rewarm_at: tuple[int, ...] = ()
    rewarm: int = 0

    def __post_init__(self) -> None:
        _require_one_of("kind", self.kind, tuple(_OPTIONS))
        _require_one_of("unit", self.unit, ("steps", "tokens"))
        self._check_options()
        self._check_rates()
        self._check_lengths()
        self._check_kind()

    def _check_options(self) -> None:
        needed, allowed = _OPTIONS[self.kind]
        special = {name for pair in _OPTIONS.values() for names in pair for name in names}
        for name in needed:
            if getattr(self, name) is None:
                raise ScheduleError(f"kind {self.kind!r} needs {name}")
        # `total` says how long the run is, which is true of every kind.
        for name in sorted(special - {*needed, *allowed, "total"}):
            if getattr(self, name) is not None:
                raise ScheduleError(f"{name} has no effect with kind {self.kind!r}: leave it out")
        if self.init_value is not None and not self.warmup:
            raise ScheduleError(
                "init_value has no effect without a warm-up: give warmup or drop it"
            )
        if bool(self.rewarm_at) != bool(self.rewarm):
            raise ScheduleError("rewarm_at and rewarm belong together: give both or neither")
        if self.tokens_per_step is not None:
            if self.unit != "tokens":
                raise ScheduleError("tokens_per_step has no effect in steps: set unit='tokens'")
            if self.tokens_per_step < 1:
                raise ScheduleError(f"tokens_per_step is {self.tokens_per_step}; it must be >= 1")

    def _check_rates(self) -> None:
        if not (math.isfinite(self.peak_value) and self.peak_value > 0):
            raise ScheduleError(f"peak_value is {self.peak_value}; it must be above 0")
        for name in ("init_value", "end_value"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= self.peak_value:
                raise ScheduleError(
                    f"{name} is {value}; it must be 0 to peak_value ({self.peak_value})"
                )
        if self.count_from not in (0, 1):
            raise ScheduleError(f"count_from is {self.count_from}; it must be 0 or 1")

    def _check_lengths(self) -> None:
        for name in _LENGTHS:
            value = getattr(self, name)
            values = value if isinstance(value, tuple) else (value,)
            least = 0 if name in ("warmup", "rewarm", "rewarm_at") else 1
            if any(one is not None and one < least for one in values):
                raise ScheduleError(f"{name} is {value}; it must be at least {least}")
        if self.total is not None and self.warmup > self.total:
            raise ScheduleError(
                f"warmup is {self.warmup}; it must be at most the length of the run ({self.total})"
            )

    def _check_kind(self) -> None:
        if self.explore_fraction is not None and not 0 <= self.explore_fraction <= 1:
            raise ScheduleError(f"explore_fraction is {self.explore_fraction}; it must be 0 to 1")
        if self.kind == "knee" and self.total is not None:
            explore = 0.5 if self.explore_fraction is None else self.explore_fraction
            knee(self.peak_value, self.total, self.warmup, explore)
        if self.power is not None and not self.power > 0:
            raise ScheduleError(f"power is {self.power}; it must be above 0")
        if self.decay_shape is not None:
            _require_one_of("decay_shape", self.decay_shape, ("linear", "cosine", "sqrt"))
        if self.kind == "inverse_sqrt" and not (self.timescale or self.warmup):
            raise ScheduleError("inverse_sqrt without a warm-up needs timescale")
        if self.decay is not None and self.total is not None:
            longest = self.total - self.warmup
            if self.decay > longest:
                raise ScheduleError(
                    f"decay is {self.decay}; after the warm-up only {longest} of the run are left"
                )
        if self.boundaries is not None and self.factors is not None:
            if len(self.boundaries) != len(self.factors):
                raise ScheduleError(
                    f"{len(self.boundaries)} boundaries but {len(self.factors)} factors: "
                    "each boundary needs one"
                )
            if list(self.boundaries) != sorted(set(self.boundaries)):
                raise ScheduleError(f"boundaries are {self.boundaries}; they must rise")
            if self.boundaries and self.boundaries[0] < self.warmup:
                raise ScheduleError(
                    f"the first boundary ({self.boundaries[0]}) lies in the warm-up ({self.warmup})"
                )
            if any(not (math.isfinite(factor) and factor >= 0) for factor in self.factors):
                raise ScheduleError(f"factors are {self.factors}; none may be below 0")

    def in_counts(self) -> ScheduleConfig:
        """The same schedule with its lengths in the counts that it will be read with."""
        per_step = self.tokens_per_step
        if per_step is None:
            return self
        steps: dict[str, object] = {}
        for name in _LENGTHS:
            value = getattr(self, name)
            if isinstance(value, tuple):
                steps[name] = tuple(-(-one // per_step) for one in value)
            elif value is not None:
                steps[name] = -(-value // per_step)
        return dataclasses.replace(self, unit="steps", tokens_per_step=None, **steps)  # type: ignore[arg-type]


def _require_one_of(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ScheduleError(f"{name} is {value!r}; it must be one of {', '.join(choices)}")
