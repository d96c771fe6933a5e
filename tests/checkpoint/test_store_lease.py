"""Two writers: one is refused or fenced, and never damages what the other has saved."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from store_writer import Writer, WriterTemplate, equals_tree, tree_of

from checkpoint.store import (
    LeaseHeld,
    ProcessIdentity,
    RetentionPolicy,
    Store,
    StoreOptions,
    StoreReader,
)

ELSEWHERE = "00000000-0000-0000-0000-00000000e15e"


@contextlib.contextmanager
def killed_at_the_end(writer: Writer) -> Iterator[Writer]:
    try:
        yield writer
    finally:
        with contextlib.suppress(ProcessLookupError):
            writer.signal(signal.SIGKILL)


def contents(path: Path) -> dict[str, bytes]:
    steps = path / "steps"
    return {
        str(file.relative_to(steps)): file.read_bytes()
        for file in sorted(steps.rglob("*"))
        if file.is_file()
    }


def test_a_second_writer_is_refused_at_once_and_names_the_first(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        start_s = time.monotonic()
        with pytest.raises(LeaseHeld, match=f"process {os.getpid()} on .* is alive"):
            Store(tmp_path)
        assert time.monotonic() - start_s < 5
        store.save(1, tree_of(1)).wait()
    with Store(tmp_path) as store:
        assert store.epoch == 2


def test_waiting_for_a_writer_to_end(tmp_path: Path, template: WriterTemplate) -> None:
    with Store(tmp_path) as store:
        writer = template.start(tmp_path, wait_s=60.0)
        with killed_at_the_end(writer):
            store.save(1, tree_of(1)).wait()
            time.sleep(0.2)
            assert writer.log() == []
            store.close()
            writer.wait_for("end")
    assert writer.log() == ["open 2", "ack 2", "end"]


def test_a_dead_writer_is_succeeded_at_once(tmp_path: Path, template: WriterTemplate) -> None:
    writer = template.start(tmp_path, num_saves=10_000, ttl_s=3600.0)
    with killed_at_the_end(writer):
        writer.wait_for("ack 2")
    writer.wait_for_state("")
    start_s = time.monotonic()
    with Store(tmp_path) as store:
        assert time.monotonic() - start_s < 60  # Of an hour that the lease still runs.
        assert store.epoch == 2
        good = store.latest_good()
        assert good is not None
        assert good >= max(writer.acked())
        assert not any((tmp_path / "staging").iterdir())
        assert [entry.name for entry in (tmp_path / "gates").iterdir()] == ["epoch-00000002"]


def test_a_reused_process_number_is_not_the_holder(tmp_path: Path) -> None:
    me = ProcessIdentity.current()
    Store(tmp_path, holder=replace(me, start_ticks=me.start_ticks - 1))
    with Store(tmp_path) as store:
        assert store.epoch == 2


def test_a_remote_writer_is_left_alone_while_its_heart_beats(
    tmp_path: Path, template: WriterTemplate
) -> None:
    writer = template.start(tmp_path, boot_id=ELSEWHERE, ttl_s=0.8, num_saves=100_000)
    with killed_at_the_end(writer):
        writer.wait_for("ack 1")
        start_s = time.monotonic()
        with pytest.raises(LeaseHeld, match=r"on elsewhere.*heartbeat is fresh"):
            Store(tmp_path)
        with pytest.raises(LeaseHeld):
            Store(tmp_path, StoreOptions(lease_wait_s=2.0))
        assert time.monotonic() - start_s < 5
        writer.signal(signal.SIGKILL)
        writer.wait_for_state("")
        with Store(tmp_path, StoreOptions(lease_wait_s=5.0)) as store:
            assert store.epoch == 2
            assert (store.latest_good() or 0) >= max(writer.acked())


def test_a_wrong_clock_does_not_end_a_lease(tmp_path: Path) -> None:
    remote = replace(ProcessIdentity.current(), boot_id=ELSEWHERE, host="elsewhere")
    store = Store(tmp_path, StoreOptions(lease_ttl_s=2.0), holder=remote)
    (beat,) = (tmp_path / "lease").glob("*.heartbeat")
    stop = threading.Event()

    def beat_in_the_past() -> None:
        count = 0
        while not stop.wait(0.1):
            count += 1
            with beat.open("r+") as file:
                file.write(f"{count:012d} {time.time() - 5000:020.3f}\n")

    store._lease._stop.set()  # Its own heartbeats would be in time.
    store._lease._thread.join()
    beat.write_text(f"{0:012d} {time.time() - 5000:020.3f}\n")
    thread = threading.Thread(target=beat_in_the_past)
    thread.start()
    try:
        with pytest.raises(LeaseHeld, match="elsewhere"):
            Store(tmp_path)
    finally:
        stop.set()
        thread.join()
    # The heart is silent and its last beat is old: two beats' time is waited for unasked.
    with Store(tmp_path) as store:
        assert store.epoch == 2


STOPS = {
    "into the gate": {"contains": "publish-", "count": 1},
    "out of the gate": {"contains": "publish-", "count": 2},
    "before the commit record": {"contains": "commit.json", "count": 1},
    "before staging": {"contains": "staging", "count": 1},
    "deleting an old step": {"contains": "delete-", "count": 1},
}


def check_a_stopped_writer_is_fenced(
    path: Path, template: WriterTemplate, stop: dict[str, object], remote: bool
) -> None:
    writer = template.start(
        path,
        boot_id=ELSEWHERE if remote else None,
        ttl_s=0.5,
        keep_last=2,
        num_saves=1000,
        num_floats=200_000,
        strike={"signal_name": "SIGSTOP", **stop},
    )
    with killed_at_the_end(writer):
        writer.wait_for_state("T")
        options = StoreOptions(
            retention=RetentionPolicy(keep_last=2),
            lease_wait_s=5.0 if remote else 0.0,
            take_over=not remote,
        )
        with Store(path, options) as store:
            good = store.latest_good() or 0
            assert good >= max(writer.acked(), default=0)
            first = max(store.steps(), default=0) + 1
            for step in (first, first + 1):
                store.save(step, tree_of(step)).wait()
            store._finish_current()
            before = contents(path)
            writer.signal(signal.SIGCONT)
            fenced = writer.wait_for("error")
            writer.wait_for("end")
            assert fenced.startswith("error Fenced"), fenced
            assert "newer" in fenced
            assert contents(path) == before, "a fenced writer changed checkpoints"
            step = first + 2
            store.save(step, tree_of(step)).wait()
            store._finish_current()
            assert not any((path / "staging").iterdir())
            assert all(store.verify(kept).ok for kept in store.steps())
            tree = store.restore(step, tree_of(step))
            assert equals_tree(step, tree)
    assert not any((path / "quarantine").iterdir())


def test_a_stopped_writer_that_wakes_is_fenced(tmp_path: Path, template: WriterTemplate) -> None:
    check_a_stopped_writer_is_fenced(tmp_path, template, STOPS["out of the gate"], remote=True)


@pytest.mark.long
@pytest.mark.parametrize("remote", [False, True], ids=["local", "remote"])
@pytest.mark.parametrize("stop", STOPS.values(), ids=STOPS)
def test_a_writer_stopped_anywhere_is_fenced(
    tmp_path: Path, template: WriterTemplate, stop: dict[str, object], remote: bool
) -> None:
    check_a_stopped_writer_is_fenced(tmp_path, template, stop, remote)


@pytest.mark.long
@pytest.mark.parametrize("delay_s", [0.0, 0.01, 0.03, 0.06, 0.1, 0.2])
def test_a_writer_stopped_while_it_writes_is_fenced(
    tmp_path: Path, template: WriterTemplate, delay_s: float
) -> None:
    writer = template.start(tmp_path, num_saves=1000, num_floats=4_000_000)
    with killed_at_the_end(writer):
        writer.wait_for("ack 1")
        time.sleep(delay_s)
        writer.signal(signal.SIGSTOP)
        writer.wait_for_state("T")
        with Store(tmp_path, StoreOptions(take_over=True)) as store:
            step = max(store.steps()) + 1
            store.save(step, tree_of(step)).wait()
            before = contents(tmp_path)
            writer.signal(signal.SIGCONT)
            assert writer.wait_for("error").startswith("error Fenced")
            assert contents(tmp_path) == before
            assert store.latest_good() == step


@pytest.mark.long
def test_many_writers_at_once_get_the_store_one_after_another(
    tmp_path: Path, template: WriterTemplate
) -> None:
    writers = [template.start(tmp_path, wait_s=100.0, num_saves=2) for _ in range(5)]
    for writer in writers:
        writer.wait_for("end", timeout_s=110)
    epochs = [int(writer.wait_for("open").split()[1]) for writer in writers]
    assert sorted(epochs) == [1, 2, 3, 4, 5]
    acked = [step for writer in writers for step in writer.acked()]
    assert sorted(acked) == list(range(1, 11))
    reader = StoreReader(tmp_path)
    assert reader.steps() == [8, 9, 10]
    for writer, epoch in zip(writers, epochs, strict=True):
        for step in set(writer.acked()) & set(reader.steps()):
            assert reader.metadata(step) == {"epoch": epoch}


def test_a_forked_process_has_no_lease(tmp_path: Path, template: WriterTemplate) -> None:
    writer = template.start(tmp_path, fork=True)
    writer.wait_for("end")
    assert writer.log()[1].startswith("forked a forked process does not inherit")
    assert writer.acked() == [1]
