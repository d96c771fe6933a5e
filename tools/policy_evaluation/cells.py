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
    machine is kept, so another run measures the others again. The verdict is
    about the readings of all cells together: a machine that was quiet each
    time, but not equally fast, spreads them.

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

    def get(self, key: str, measure: Measure, *, is_basis: bool = False) -> dict[str, Any]:
        """The figures of a cell: those that were kept, or measured now.

        Args:
            is_basis: other cells are measured by its figures, and none that is kept may rest
                on one that is not. So where cells are kept, a void one is measured again.

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
            figures, readings = self._measured(measure)
            reasons = [*readings.noise().void_reasons(), *figures.get(VOID, ())]
            if reasons:
                line = f"{self.part}.{key} is void: {'; '.join(reasons)}"
                print(line, file=sys.stderr, flush=True)
            if not (reasons and is_basis and path is not None):
                break
        self._readings.append(readings)
        if path is not None and not reasons:
            path.parent.mkdir(parents=True, exist_ok=True)
            record = {"figures": figures, "readings": asdict(readings)}
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(record), "utf-8")
            partial.rename(path)
        return figures

    def _measured(self, measure: Measure) -> tuple[dict[str, Any], Readings]:
        meter = self.make_meter(self.rig)
        meter.sample(_REPEATS, whole_repeats=0)
        figures = measure(meter)
        meter.sample(_REPEATS, whole_repeats=0)
        return figures, meter.readings()

    def readings(self) -> Readings:
        """Of all cells asked for so far."""
        return merged(self._readings)

    def noise(self) -> Noise:
        return self.readings().noise()
