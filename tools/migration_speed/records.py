"""Records: what was measured, kept in a file of JSON lines, and the table of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tools.migration_speed.bounds import Bounds
from tools.migration_speed.conversion import Measured
from tools.migration_speed.load import MAX_FOREIGN_SHARE


@dataclass(frozen=True)
class Record:
    """One conversion, and the bounds measured shortly before it.

    Attributes:
        round: from 0.
        conversion: its name.
        began: when the bounds were measured, ISO 8601.
        measured: the conversion.
        bounds: of the same spell.
    """

    round: int
    conversion: str
    began: str
    measured: Measured
    bounds: Bounds

    @property
    def foreign_share(self) -> float:
        """The larger one of the conversion and its bounds; 0 where neither was read."""
        return max(self.measured.foreign_share or 0.0, self.bounds.foreign_share or 0.0)

    @property
    def is_void(self) -> bool:
        """Whether others were too busy."""
        return self.foreign_share > MAX_FOREIGN_SHARE


def load_records(file: Path) -> list[Record]:
    """All that were kept; none if there is no file."""
    if not file.exists():
        return []
    entries = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        Record(
            **entry
            | {"measured": Measured(**entry["measured"]), "bounds": Bounds(**entry["bounds"])}
        )
        for entry in entries
    ]


def keep_record(file: Path, record: Record) -> None:
    """Append one."""
    with file.open("a") as sink:
        sink.write(f"{json.dumps(dataclasses.asdict(record))}\n")


def text_of(records: Sequence[Record]) -> str:
    """A line a conversion: medians, and the least and the most, without what is void."""
    num_void = sum(record.is_void for record in records)
    records = [record for record in records if not record.is_void]
    if not records:
        return f"nothing was measured that is not void; {num_void} are"
    spells = list({record.began: record.bounds for record in records}.values())
    bounds = (
        f"model of {records[0].measured.num_bytes / 1e9:.2f} GB; "
        f"cp {_spread([one.copy_s for one in spells])} s, cp and sync "
        f"{_spread([one.synced_copy_s for one in spells])} s, plain read and write "
        f"{_spread([one.plain_s for one in spells])} s"
    )
    names = dict.fromkeys(record.conversion for record in records)
    foreign = max(record.foreign_share for record in records)
    load = f"others took {foreign:.0%} of the processor or less; {num_void} void left out"
    return "\n".join((bounds, *(_line(name, records) for name in names), load))


def _line(name: str, records: Sequence[Record]) -> str:
    found = [record for record in records if record.conversion == name]

    def of(value: Callable[[Record], float], digits: int = 2) -> str:
        return _spread([value(record) for record in found], digits)

    return (
        f"  {name:<28} {len(found)} times: {of(lambda one: one.measured.seconds)} s, "
        f"{of(lambda one: one.measured.seconds / one.bounds.copy_s)} x cp, "
        f"{of(lambda one: one.measured.seconds / one.bounds.synced_copy_s)} x cp and sync, "
        f"{of(lambda one: 100 * one.bounds.plain_s / one.measured.seconds, 0)} % of the rate of "
        f"read and write; whole process {of(lambda one: one.measured.process_s)} s; peak "
        f"{max(one.measured.peak_bytes for one in found) / 1e6:.0f} MB, imports "
        f"{max(one.measured.imports_bytes for one in found) / 1e6:.0f} MB"
    )


def _spread(values: Sequence[float], digits: int = 2) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"
