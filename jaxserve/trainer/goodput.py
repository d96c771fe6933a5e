"""Where the time of a run goes: every moment belongs to exactly one category."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

Category = Literal[
    "init",
    "compile",
    "step",
    "data_wait",
    "lr_probe",
    "evaluation",
    "ckpt_stall",
    "lost_work",
    "restart",
    "idle",
]
CATEGORIES: tuple[Category, ...] = get_args(Category)
"""`step` is the good part. `init`: until the first generation's trainers are ready; `compile`:
from there to its first step; `restart`: the same two of later generations, and ending the one
before; `lr_probe`: probes of a rate that tunes itself; `lost_work`: steps computed and not kept;
`ckpt_stall`: trainers waiting for the disk; `idle`: waiting between failures, and the end."""


class Goodput:
    """A stopwatch with one hand and many dials."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """Starts in `init`. `clock`: monotonic seconds."""
        self._clock = clock
        self._seconds: dict[Category, float] = dict.fromkeys(CATEGORIES, 0.0)
        self._current: Category = "init"
        self._since_s = self._start_s = clock()

    @property
    def current(self) -> Category:
        """What time is spent on now."""
        return self._current

    def switch(self, category: Category) -> None:
        """From now on time counts as `category`."""
        now_s = self._clock()
        self._seconds[self._current] += now_s - self._since_s
        self._current, self._since_s = category, now_s

    def move(self, seconds: float, source: Category, target: Category) -> None:
        """Time that was counted as `source` turns out to be `target`."""
        self.switch(self._current)
        moved = min(seconds, self._seconds[source])
        self._seconds[source] -= moved
        self._seconds[target] += moved

    @property
    def wall_s(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._start_s

    def seconds(self) -> Mapping[Category, float]:
        """Seconds by category; their sum is the time since the start."""
        self.switch(self._current)
        return dict(self._seconds)

    def summary(self) -> dict[str, float]:
        """The same with `wall` and `goodput` (share of `step`), rounded, for people and JSON."""
        seconds = self.seconds()
        wall_s = sum(seconds.values())
        return {
            **{f"{name}_s": round(value, 3) for name, value in seconds.items()},
            "wall_s": round(wall_s, 3),
            "goodput": round(seconds["step"] / wall_s, 4) if wall_s else 0.0,
        }
