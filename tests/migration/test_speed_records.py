"""What the bench of conversions keeps is what it measured, and its table has the medians."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import pytest

from tools.migration_speed.bounds import Bounds
from tools.migration_speed.conversion import Conversion, Measured
from tools.migration_speed.records import Record, keep_record, load_records, text_of


@pytest.mark.parametrize(
    "name", ["safetensors-orbax", "orbax-safetensors+full", "safetensors-gguf-Q8_0+none"]
)
def test_a_conversion_is_called_by_its_name(name: str) -> None:
    assert Conversion.parse(name).name == name


@pytest.mark.parametrize("name", ["gguf-orbax", "safetensors-zip", "safetensors-orbax+some"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"give|stands"):
        Conversion.parse(name)


def test_the_table_has_medians_of_ratios_to_each_rounds_own_bounds(tmp_path: Path) -> None:
    records = [
        Record(
            number,
            "safetensors-orbax",
            f"round {number}",
            Measured(seconds, seconds + 3, 500_000_000, 200_000_000, 4_000_000_000),
            Bounds(copy_s, 2 * copy_s, 3.0),
        )
        for number, (seconds, copy_s) in enumerate([(3.0, 2.0), (8.0, 4.0), (5.0, 5.0)])
    ]
    assert load_records(tmp_path / "records.jsonl") == []
    for record in records:
        keep_record(tmp_path / "records.jsonl", record)
    assert load_records(tmp_path / "records.jsonl") == records
    busy = Bounds(9.0, 9.0, 9.0, foreign_share=0.2)
    void = dataclasses.replace(records[0], began="round 3", bounds=busy)
    bounds, line, load = text_of([*records, void]).splitlines()
    assert load.endswith("1 void left out")
    assert "cp 4.00 (2.00 to 5.00) s" in bounds
    assert "3 times: 5.00 (3.00 to 8.00) s, 1.50 (1.00 to 2.00) x cp" in line
    assert "60 (38 to 100) % of the rate of read and write" in line
