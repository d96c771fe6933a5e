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
    """Reads a busy machine the first two times, then a quiet one."""

    num_made: ClassVar[int] = 0

    def __post_init__(self) -> None:
        ScriptedMeter.num_made += 1

    def sample(self, repeats: int = 12, *, whole_repeats: int = 2) -> None:
        """No step is timed."""

    def readings(self) -> Readings:
        return readings(0.050, 0.090 if ScriptedMeter.num_made < 3 else 0.051)


@pytest.mark.parametrize(("is_basis", "num_measured"), [(True, 3), (False, 1)])
def test_nothing_kept_rests_on_a_void_basis(
    tmp_path: Path, is_basis: bool, num_measured: int
) -> None:
    """A basis is measured until it can be kept; another cell once, and the next run tries again."""
    ScriptedMeter.num_made = 0
    cells = Cells(NO_RIG, "sl9", tmp_path, make_meter=ScriptedMeter)
    assert cells.get("a", lambda _: {"key": "a"}, is_basis=is_basis) == {"key": "a"}
    assert ScriptedMeter.num_made == num_measured
    assert bool(cells.noise().void_reasons()) != is_basis
    assert (tmp_path / "sl9.a.json").exists() == is_basis


def test_a_basis_that_is_void_ends_the_run_when_time_is_up(tmp_path: Path) -> None:
    ScriptedMeter.num_made = 0
    cells = Cells(NO_RIG, "sl9", tmp_path, time.monotonic() + 60, make_meter=ScriptedMeter)

    def last(_: NoiseMeter) -> dict[str, Any]:
        cells.last_start_s = 0.0
        return {}

    with pytest.raises(UnfinishedError, match="sl9: a "):
        cells.get("a", last, is_basis=True)


def test_the_noise_is_that_of_all_cells_together(tmp_path: Path) -> None:
    """Each was quiet, but the machine was half as fast again for one of them."""
    keep(tmp_path, "a", readings(0.050, 0.051, 0.050))
    keep(tmp_path, "b", readings(0.075, 0.076, 0.075, foreign=0.09))
    cells = Cells(NO_RIG, "sl9", tmp_path, last_start_s=0.0)
    cells.get("a", pytest.fail)
    assert not cells.noise().void_reasons()
    cells.get("b", pytest.fail)
    assert cells.noise().calibration_spread > MAX_SPREAD
    assert cells.noise().foreign_cpu_share == 0.09
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
