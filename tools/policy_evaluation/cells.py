"""Cells: pieces of a part, each measured once and kept, so that a part may take several runs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.verdict import Noise, NoiseMeter, Readings, merged

_REPEATS = 8
VOID = "void_reasons"
"""Figure of a cell that says why it can't be used, if it says anything."""

Measure = Callable[[NoiseMeter], dict[str, Any]]
"""Measures a cell. The meter has one sample when it begins, and gets another at the end."""


class UnfinishedError(Exception):
    """Time is up, and cells are missing."""


@dataclass(slots=True)
class Cells:
    """Of one part of the evaluation.

    A cell is kept as `FOLDER/PART.KEY.json`: its figures, and what the
    calibration loop read around it. Only a cell that was measured on a quiet
    machine is kept; where cells are kept, a void one is measured again. Without
    a folder a void cell makes its part void.

    Args:
        folder: None keeps nothing.
        last_start_s: no cell is begun later, on the monotonic clock.
        make_meter: what reads the machine around a cell.
    """

    rig: Rig
    part: str
    folder: Path | None = None
    last_start_s: float = float("inf")
    make_meter: Callable[[Rig], NoiseMeter] = NoiseMeter
    _readings: list[Readings] = field(default_factory=list)

    def get(self, key: str, measure: Measure) -> dict[str, Any]:
        """The figures of a cell: those that were kept, or measured now.

        Raises UnfinishedError if it is too late to measure.
        """
        path = None if self.folder is None else self.folder / f"{self.part}.{key}.json"
        if path is not None and path.exists():
            kept = json.loads(path.read_text("utf-8"))
            self._readings.append(Readings(**kept["readings"]))
            return dict(kept["figures"])
        while True:
            if time.monotonic() > self.last_start_s:
                raise UnfinishedError(f"{self.part}: {key} and what follows is not measured yet")
            meter = self.make_meter(self.rig)
            meter.sample(_REPEATS, whole_repeats=0)
            if path is not None and meter.noise().void_reasons():
                continue  # It could only become void: wait for a quieter moment.
            figures = measure(meter)
            meter.sample(_REPEATS, whole_repeats=0)
            readings = meter.readings()
            reasons = [*readings.noise().void_reasons(), *figures.get(VOID, ())]
            if reasons:
                line = f"{self.part}.{key} is void: {'; '.join(reasons)}"
                print(line, file=sys.stderr, flush=True)
            if path is None or not reasons:
                break
        self._readings.append(readings)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {"figures": figures, "readings": asdict(readings)}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(record), "utf-8")
            partial.rename(path)
        return figures

    def readings(self) -> Readings:
        """Of all cells asked for so far.

        For cells whose figures are seconds: a machine that was quiet each time, but not equally
        fast, spreads them.
        """
        return merged(self._readings)

    def worst_noise(self) -> Noise:
        """The worst of each cell.

        For cells whose figures are in units of the steps that the calibration loop timed just
        before: how fast the machine was then does not matter, only that it stayed so.
        """
        noises = [one.noise() for one in self._readings]
        return Noise(
            max(one.calibration_spread for one in noises),
            max(one.foreign_cpu_share for one in noises),
            max(one.load_average for one in noises),
        )
