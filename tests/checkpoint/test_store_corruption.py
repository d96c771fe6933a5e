"""Damage to a stored step: always found, always quarantined, never handed out."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import resource
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tensorstore as ts
from store_writer import equals_tree, tree_of

from checkpoint.store import CorruptStep, SaveFailed, Store, StoreReader, StoreUnreadable
from checkpoint.store.commit import CommitRecord
from checkpoint.store.digests import blake3_of_file
from checkpoint.store.durable import sha256_hex
from checkpoint.store.manifest import FileRecord
from checkpoint.store.verification import load_manifest

NEWEST, OLDER = 2, 1
BIG = ("params.layers.w", "opt_state.mu")


def folder_of(path: Path, step: int) -> Path:
    return path / "steps" / f"{step:012d}"


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def independent_read(folder: Path) -> dict[str, bytes]:
    """The arrays by TensorStore alone, without a line of the store's code."""
    base = {"driver": "file", "path": f"{folder / 'arrays'}/"}
    context = ts.Context()
    arrays = {}
    for name in BIG:
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        opened = ts.open({"driver": "zarr", "kvstore": kvstore}, context=context, open=True)
        arrays[name] = np.asarray(opened.result().read().result()).tobytes()
    return arrays


class Lab:
    """A store of two good steps whose newest one is damaged again and again."""

    def __init__(self, path: Path, seed: int) -> None:
        self.path = path / "store"
        self.random = random.Random(seed)
        self.store = Store(self.path)
        for step in (OLDER, NEWEST):
            self.store.save(step, tree_of(step), {"step": step}).wait()
        self.store._finish_current()
        self.folder = folder_of(self.path, NEWEST)
        self.pristine = path / "pristine"
        shutil.copytree(self.folder, self.pristine)
        self.good = independent_read(self.folder)
        self.data = self._data_ranges()

    def _data_ranges(self) -> list[tuple[Path, int, int]]:
        """File, offset and size in bytes of the arrays' values, found by their content."""
        ranges = []
        layers = np.frombuffer(self.good[BIG[0]], np.uint8).reshape(4, -1)
        for values in [*(row.tobytes() for row in layers), self.good[BIG[1]]]:
            for path in files_of(self.folder):
                offset = path.read_bytes().find(values)
                if offset >= 0:
                    ranges.append((path.relative_to(self.folder), offset, len(values)))
        assert len(ranges) >= 5
        return ranges

    def mend(self) -> None:
        shutil.rmtree(self.path / "quarantine")
        (self.path / "quarantine").mkdir()
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self.pristine, self.folder)

    def is_damaged(self) -> bool:
        def content(folder: Path) -> dict[str, tuple[bool, bytes]]:
            return {
                path.relative_to(folder).as_posix(): (path.is_symlink(), path.read_bytes())
                for path in files_of(folder)
            }

        return content(self.folder) != content(self.pristine)


def flip_a_bit(path: Path, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def flip_in_data(lab: Lab) -> str:
    path, offset, size = lab.random.choice(lab.data)
    flip_a_bit(lab.folder / path, offset + lab.random.randrange(size), lab.random.randrange(8))
    return path.as_posix()


def zero_in_data(lab: Lab) -> str:
    path, offset, size = lab.random.choice(lab.data)
    data = bytearray((lab.folder / path).read_bytes())
    start = offset + lab.random.randrange(size - 16)
    data[start : start + 16] = bytes(16)
    (lab.folder / path).write_bytes(data)
    return path.as_posix()


def any_file(lab: Lab) -> Path:
    return lab.random.choice([path for path in files_of(lab.folder) if path.stat().st_size])


def flip_anywhere(lab: Lab) -> str:
    path = any_file(lab)
    flip_a_bit(path, lab.random.randrange(path.stat().st_size), lab.random.randrange(8))
    return path.relative_to(lab.folder).as_posix()


def truncate(lab: Lab) -> str:
    path = any_file(lab)
    path.write_bytes(path.read_bytes()[: lab.random.randrange(path.stat().st_size)])
    return path.relative_to(lab.folder).as_posix()


def append(lab: Lab) -> str:
    path = any_file(lab)
    path.write_bytes(path.read_bytes() + b"\n")
    return path.relative_to(lab.folder).as_posix()


def delete(lab: Lab) -> str:
    path = any_file(lab)
    path.unlink()
    return path.relative_to(lab.folder).as_posix()


def add(lab: Lab) -> str:
    path = any_file(lab).parent / f"extra{lab.random.randrange(9)}"
    path.write_bytes(b"" if lab.random.random() < 0.5 else b"x")
    return path.relative_to(lab.folder).as_posix()


def link(lab: Lab) -> str:
    path = any_file(lab)
    copy = lab.path.parent / "elsewhere"
    shutil.copyfile(path, copy)
    path.unlink()
    path.symlink_to(copy)
    return path.relative_to(lab.folder).as_posix()


def swap(lab: Lab) -> str:
    one, two = lab.random.sample([*files_of(lab.folder)], 2)
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return ""


def stale_manifest(lab: Lab) -> str:
    shutil.copyfile(folder_of(lab.path, OLDER) / "manifest.json", lab.folder / "manifest.json")
    return "manifest.json"


def stale_manifest_and_commit(lab: Lab) -> str:
    for name in ("manifest.json", "commit.json"):
        shutil.copyfile(folder_of(lab.path, OLDER) / name, lab.folder / name)
    return "commit.json"


def another_step(lab: Lab) -> str:
    shutil.rmtree(lab.folder)
    shutil.copytree(folder_of(lab.path, OLDER), lab.folder)
    return "commit.json"


DATA = (flip_in_data, flip_in_data, flip_in_data, zero_in_data)
OTHER = (
    *(flip_anywhere, flip_anywhere, truncate, append, delete, add, link, swap),
    *(stale_manifest, stale_manifest_and_commit, another_step),
)


def injections(lab: Lab, count: int) -> Iterator[Callable[[Lab], str]]:
    for number in range(count):
        yield DATA[number // 2 % len(DATA)] if number % 2 else OTHER[number // 2 % len(OTHER)]


def check_injections(path: Path, count: int, seed: int) -> Counter[str]:
    lab = Lab(path, seed)
    counted: Counter[str] = Counter()
    for inject in injections(lab, count):
        lab.mend()
        where = inject(lab)
        if not lab.is_damaged():
            continue  # Two files of equal content were swapped.
        counted[inject.__name__] += 1
        if inject in DATA:
            assert independent_read(lab.folder) != lab.good, "the fault did not hit array data"
            counted["silent for TensorStore alone"] += 1
        report = StoreReader(lab.path).verify(NEWEST)
        assert not report.ok, f"{inject.__name__} {where} passed verification (seed {seed})"
        assert lab.folder.is_dir(), "verification moved something"
        restored = lab.store.restore_latest(tree_of(NEWEST))
        assert restored is not None
        assert restored.step == OLDER, f"{inject.__name__} {where} was not noticed (seed {seed})"
        assert equals_tree(OLDER, restored.tree)
        (error,) = restored.skipped
        named = [problem.where for problem in error.problems]
        assert not where or where in named or "manifest.json" in named, (where, named)
        moved = [entry for entry in (lab.path / "quarantine").iterdir() if entry.is_dir()]
        assert len(moved) == 1
        assert lab.store.steps() == [OLDER]
    lab.store.close()
    return counted


def test_40_injections(tmp_path: Path) -> None:
    logging.getLogger("checkpoint.store").setLevel(logging.CRITICAL)
    try:
        counted = check_injections(tmp_path, 42, seed=1)
    finally:
        logging.getLogger("checkpoint.store").setLevel(logging.NOTSET)
    assert sum(counted.values()) - counted["silent for TensorStore alone"] >= 40
    assert counted["silent for TensorStore alone"] >= 20


@pytest.mark.long
@pytest.mark.parametrize("seed", [2, 3])
def test_260_injections(tmp_path: Path, seed: int) -> None:
    logging.getLogger("checkpoint.store").setLevel(logging.CRITICAL)
    try:
        counted = check_injections(tmp_path, 270, seed)
    finally:
        logging.getLogger("checkpoint.store").setLevel(logging.NOTSET)
    print(f"seed {seed}: {dict(counted)}")
    assert sum(counted.values()) - counted["silent for TensorStore alone"] >= 260
    assert counted["silent for TensorStore alone"] >= 130


def test_fall_back_is_loud_and_names_the_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lab = Lab(tmp_path, seed=5)
    where = flip_in_data(lab)
    with caplog.at_level(logging.ERROR):
        assert lab.store.latest_good() == OLDER
    assert where in caplog.text
    assert "quarantine" in caplog.text
    lab.mend()
    flip_in_data(lab)
    with pytest.raises(CorruptStep, match=where.split("/")[0]):
        lab.store.restore(NEWEST, tree_of(NEWEST))
    lab.store.close()


def test_array_digests_hold_even_if_the_files_digests_were_made_anew(tmp_path: Path) -> None:
    lab = Lab(tmp_path, seed=8)
    where = flip_in_data(lab)
    manifest = load_manifest(lab.folder, NEWEST)
    record = FileRecord(manifest.files[where].size_bytes, blake3_of_file(lab.folder / where))
    data = replace(manifest, files={**manifest.files, where: record}).encode()
    (lab.folder / "manifest.json").write_bytes(data)
    commit = CommitRecord.decode((lab.folder / "commit.json").read_bytes())
    commit = replace(commit, manifest_sha256=sha256_hex(data))
    (lab.folder / "commit.json").write_bytes(commit.encode())
    (problem,) = lab.store.verify(NEWEST).problems
    assert problem.where.startswith("array ")
    with pytest.raises(CorruptStep, match="its values are not those saved"):
        lab.store.restore(NEWEST, tree_of(NEWEST))
    assert lab.store.latest_good() == OLDER
    lab.store.close()


def test_values_that_were_written_wrong_are_not_committed(tmp_path: Path) -> None:
    flipped: list[Path] = []
    armed = True

    def flip_before_orbax_is_done(event: str, arguments: tuple[object, ...]) -> None:
        if armed and event == "os.rename" and "orbax-checkpoint-tmp" in str(arguments[0]):
            (path, *_) = sorted(
                Path(str(arguments[0])).rglob("d/*"), key=lambda p: -p.stat().st_size
            )
            flip_a_bit(path, 100, 3)
            flipped.append(path)

    with Store(tmp_path) as store:
        store.save(1, tree_of(1)).wait()
        sys.addaudithook(flip_before_orbax_is_done)
        try:
            with pytest.raises(SaveFailed, match="read back: its values are not those saved"):
                store.save(2, tree_of(2)).wait()
        finally:
            armed = False
        assert flipped
        assert store.steps() == [1]
        store.save(2, tree_of(2)).wait()
        assert store.latest_good() == 2


def test_a_reader_skips_damage_and_leaves_it_in_place(tmp_path: Path) -> None:
    lab = Lab(tmp_path, seed=6)
    lab.store.close()
    flip_in_data(lab)
    reader = StoreReader(lab.path)
    assert reader.latest_good() == OLDER
    restored = reader.restore_latest(tree_of(NEWEST))
    assert restored is not None
    assert equals_tree(OLDER, restored.tree)
    with pytest.raises(CorruptStep):
        reader.read_arrays(NEWEST)
    assert reader.steps() == [OLDER, NEWEST]


def test_a_refusal_of_the_system_is_no_damage(tmp_path: Path) -> None:
    lab = Lab(tmp_path, seed=7)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(0)
    os.close(lowest_free)
    try:
        # Room for 0 to 5 files: refused at the commit record, a folder, a file, in TensorStore.
        for room in range(6):
            resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + room, hard))
            with contextlib.suppress(StoreUnreadable):
                lab.store.restore(NEWEST, tree_of(NEWEST))
            assert lab.folder.is_dir(), f"room {room}"
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, hard))
        with pytest.raises(StoreUnreadable, match="cannot be opened"):
            lab.store.restore(NEWEST, tree_of(NEWEST))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert lab.store.latest_good() == NEWEST
    lab.store.close()
