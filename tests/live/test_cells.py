"""Parts in several runs: what is kept, what a search over cells asks for, what it concludes."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import pytest

from tools.policy_evaluation.cells import Cells, UnfinishedError
from tools.policy_evaluation.ladder import Ladder
from tools.policy_evaluation.rig import Rig
from tools.policy_evaluation.verdict import MAX_SPREAD, NoiseMeter, Readings

NO_RIG = cast(Rig, None)
"""Kept cells need no engine."""


def readings(*full_s: float, foreign: float = 0.0) -> Readings:
    return Readings({"full": full_s, "decode": (0.01,)}, [1e3 * full_s[0]], foreign, 0.5)


def keep(folder: Path, key: str, value: Readings) -> None:
    record = {"figures": {"key": key}, "readings": asdict(value)}
    (folder / f"sl9.{key}.json").write_text(json.dumps(record))


def test_a_kept_cell_is_not_measured_again(tmp_path: Path) -> None:
    keep(tmp_path, "a", readings(0.050, 0.051))
    cells = Cells(NO_RIG, "sl9", tmp_path, last_start_s=0.0)
    assert cells.get("a", pytest.fail) == {"key": "a"}
    with pytest.raises(UnfinishedError, match="sl9: b "):
        cells.get("b", pytest.fail)
    # Cells of another part are not this one's.
    with pytest.raises(UnfinishedError):
        Cells(NO_RIG, "sl8", tmp_path, last_start_s=0.0).get("a", pytest.fail)


@dataclass
class ScriptedMeter(NoiseMeter):
    """Makes samples as `script` says: quiet ones (True) and busy ones; then only quiet ones."""

    script: ClassVar[list[bool]] = []
    is_quiet: bool = True

    def __post_init__(self) -> None:
        """No CPU is looked at."""

    def sample(self, repeats: int = 12, *, whole_repeats: int = 2) -> None:
        """No step is timed."""
        self.is_quiet &= ScriptedMeter.script.pop(0) if ScriptedMeter.script else True

    def readings(self) -> Readings:
        return readings(0.050, 0.051 if self.is_quiet else 0.090)


@pytest.mark.parametrize(
    ("is_kept", "script", "num_measured"),
    [
        (True, [True, False, True, False], 3),
        (True, [False, False], 1),  # Not begun before it is quiet.
        (False, [True, False], 1),
        (False, [False, False], 1),
    ],
)
def test_a_void_cell_is_measured_again_where_cells_are_kept(
    tmp_path: Path, is_kept: bool, script: list[bool], num_measured: int
) -> None:
    """Else its part is void."""
    ScriptedMeter.script = script
    folder = tmp_path if is_kept else None
    cells = Cells(NO_RIG, "sl9", folder, make_meter=ScriptedMeter)
    measured: list[NoiseMeter] = []

    def measure(meter: NoiseMeter) -> dict[str, Any]:
        measured.append(meter)
        return {"key": "a"}

    assert cells.get("a", measure) == {"key": "a"}
    assert len(measured) == num_measured
    assert bool(cells.worst_noise().void_reasons()) != is_kept
    assert (tmp_path / "sl9.a.json").exists() == is_kept


def test_a_cell_that_says_itself_that_it_is_void_is_not_kept(tmp_path: Path) -> None:
    ScriptedMeter.script = []
    cells = Cells(NO_RIG, "sl9", tmp_path, make_meter=ScriptedMeter)
    reasons = [["the generator lagged"], []]
    assert cells.get("a", lambda _: {"void_reasons": reasons.pop(0)}) == {"void_reasons": []}
    assert not reasons


def test_a_void_cell_ends_the_run_when_time_is_up(tmp_path: Path) -> None:
    ScriptedMeter.script = [True, False]
    cells = Cells(NO_RIG, "sl9", tmp_path, time.monotonic() + 60, make_meter=ScriptedMeter)

    def last(_: NoiseMeter) -> dict[str, Any]:
        cells.last_start_s = 0.0
        return {}

    with pytest.raises(UnfinishedError, match="sl9: a "):
        cells.get("a", last)


def test_the_noise_of_several_cells(tmp_path: Path) -> None:
    """Each was quiet, but the machine was half as fast again for one of them: that matters where
    their seconds are compared, and not where each is in units of its own steps."""
    keep(tmp_path, "a", readings(0.050, 0.051, 0.050))
    keep(tmp_path, "b", readings(0.075, 0.076, 0.075, foreign=0.09))
    cells = Cells(NO_RIG, "sl9", tmp_path, last_start_s=0.0)
    cells.get("a", pytest.fail)
    assert not cells.readings().noise().void_reasons()
    cells.get("b", pytest.fail)
    together, worst = cells.readings().noise(), cells.worst_noise()
    assert together.calibration_spread > MAX_SPREAD
    assert worst.calibration_spread == pytest.approx(0.0008 / 0.050)
    assert together.foreign_cpu_share == worst.foreign_cpu_share == 0.09
    assert len(cells.readings().full_ms_by_sample) == 2


@pytest.mark.parametrize(
    ("rival", "ours", "gain", "num_probes"),
    [
        (-1, 5, (2, True), 2),  # Enough at once: how much more is not asked.
        (1, 4, (2, True), 4),
        (1, 2, (1, False), 6),
        (-3, -2, (1, False), 9),
        (0, -1, (-1, False), 7),
    ],
)
def test_rungs_gained(rival: int, ours: int, gain: tuple[int, bool], num_probes: int) -> None:
    asked: list[tuple[str, int]] = []

    def meets(name: str, highest: int, rung: int) -> bool:
        asked.append((name, rung))
        return rung <= highest

    ladder = Ladder(1.1)
    found = ladder.gain(partial(meets, "ours", ours), partial(meets, "rival", rival), 0, ratio=1.2)
    assert found == gain
    assert len(asked) == len(set(asked)) == num_probes
    assert Ladder(1.3).rungs(1.5) == 2


@pytest.mark.parametrize(("rival", "message"), [(100, "begin higher"), (-100, "begin lower")])
def test_a_ladder_ends(rival: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ladder(1.1).gain(lambda _: False, lambda rung: rung <= rival, 0, ratio=1.2)
