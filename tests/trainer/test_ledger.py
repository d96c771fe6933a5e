"""The ledger: its chain, torn tails, fencing and full disks."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest

from jaxserve.trainer.errors import LedgerError
from jaxserve.trainer.ledger import Ledger, committed_steps, read_ledger
from tests.trainer import independent_reader


class FencedError(Exception):
    pass


def open_ledger(path: Path, epoch: int = 1, check: Any = lambda: None) -> Ledger:
    return Ledger(path, epoch=epoch, check_lease=check, clock=lambda: 1000.0)


def step(number: int) -> dict[str, Any]:
    return {"kind": "step", "step": number, "loss_hex": f"{number:08x}"}


def test_lines_continue_the_chain_over_writers(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    first = open_ledger(path)
    first.append([step(0), step(1)])
    first.close()
    second = open_ledger(path, epoch=2)
    second.append([step(2)])
    records = independent_reader.ledger_records(path)
    assert [record["step"] for record in records] == [0, 1, 2]
    assert [record["epoch"] for record in records] == [1, 1, 2]
    assert list(read_ledger(path).records) == records == second.records


@pytest.mark.parametrize("torn", [b'{"kind":"st', b'{"kind":"step"}\n', b"\0" * 40])
def test_torn_tail_is_repaired_and_recorded(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = open_ledger(path)
    ledger.append([step(0)])
    with path.open("ab") as file:
        file.write(torn)
    again = open_ledger(path, epoch=2)
    again.append([step(1)])
    records = independent_reader.ledger_records(path)
    assert [record["kind"] for record in records] == ["step", "torn_tail", "step"]
    assert records[1]["num_bytes"] == len(torn)


def test_any_changed_line_is_found(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    open_ledger(path).append([step(number) for number in range(4)])
    lines = path.read_bytes().splitlines(keepends=True)
    for damaged in (
        [lines[0].replace(b"00000000", b"00000001"), *lines[1:]],
        [lines[0], *lines[2:]],
        [lines[1], lines[0], *lines[2:]],
    ):
        path.write_bytes(b"".join(damaged))
        with pytest.raises(LedgerError, match=r"line \d: the chain of hashes is broken"):
            open_ledger(path, epoch=2)


def test_writer_of_an_earlier_epoch_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    old = open_ledger(path)
    old.append([step(0)])
    new = open_ledger(path, epoch=2)
    before = path.read_bytes()
    # Even if it had just looked at the lease when the newer writer came.
    old.append([step(1)])
    assert path.read_bytes() == before
    new.append([step(1)])
    assert [record["epoch"] for record in independent_reader.ledger_records(path)] == [1, 2]


def test_lost_lease_stops_an_append(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    is_lost = False

    def check() -> None:
        if is_lost:
            raise FencedError

    ledger = open_ledger(path, check=check)
    ledger.append([step(0)])
    is_lost = True
    with pytest.raises(FencedError):
        ledger.append([step(1)])
    assert len(independent_reader.ledger_records(path)) == 1


def test_full_disk_leaves_whole_lines_and_keeps_notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = open_ledger(path)
    ledger.append([step(0)])
    write = os.write
    with monkeypatch.context() as patched:

        def half(fd: int, data: Any) -> int:
            write(fd, bytes(data)[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        patched.setattr(os, "write", half)
        with pytest.raises(OSError, match="No space"):
            ledger.append([step(1)])
        ledger.note(kind="checkpoint_failed", error="full")
    assert len(independent_reader.ledger_records(path)) == 1
    ledger.append([step(1)])
    kinds = [record["kind"] for record in independent_reader.ledger_records(path)]
    assert kinds == ["step", "checkpoint_failed", "step"]


def test_rollback_takes_steps_back() -> None:
    records = [*map(step, range(5)), {"kind": "rollback", "to_step": 2}, step(2)]
    assert sorted(committed_steps(records)) == [0, 1, 2]
    assert committed_steps(records)[2] is records[-1]


def test_not_json_is_no_record(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    path.write_text(json.dumps([1]) + "\n" + json.dumps([2]) + "\n")
    with pytest.raises(LedgerError, match="line 1"):
        read_ledger(path)
