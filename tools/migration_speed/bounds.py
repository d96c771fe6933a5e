"""Bounds: seconds of a copy, and of plain input and output of as many bytes."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from tools.migration_speed.load import ForeignLoad

BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Bounds:
    """Of a folder's files, which are in the page cache.

    Attributes:
        copy_s: `cp -r`.
        synced_copy_s: the same, and a sync of what it wrote.
        plain_s: reading to nowhere, and writing as many bytes from memory, synced.
        foreign_share: see `ForeignLoad`; None where it was not read.
    """

    copy_s: float
    synced_copy_s: float
    plain_s: float
    foreign_share: float | None = None


def measure_bounds(source: Path, folder: Path) -> Bounds:
    """Of a folder with one `model.safetensors`; writes to `folder`, which it leaves empty."""
    read_all(source)
    load = ForeignLoad()
    copy_s = seconds_of_copy(source, folder / "copy", is_synced=False)
    synced_s = seconds_of_copy(source, folder / "copy", is_synced=True)
    read_s, write_s = seconds_of_plain_io(source / "model.safetensors", folder / "plain")
    (folder / "plain").unlink()
    return Bounds(copy_s, synced_s, read_s + write_s, load.share())


def seconds_of_copy(source: Path, target: Path, *, is_synced: bool) -> float:
    """`cp -r`, and a sync of what was written. Deletes the copy afterwards."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", source, target], check=True)
    if is_synced:
        for path in target.iterdir():
            _sync(path)
    seconds = time.perf_counter() - start
    shutil.rmtree(target)
    return seconds


def seconds_of_plain_io(file: Path, target: Path) -> tuple[float, float]:
    """Reading a file to nowhere, and writing as many bytes from memory, synced."""
    size = file.stat().st_size
    start = time.perf_counter()
    buffer = read_file(file)
    read_s = time.perf_counter() - start
    start = time.perf_counter()
    with target.open("wb", buffering=0) as sink:
        for done in range(0, size, BLOCK_BYTES):
            sink.write(buffer[: min(BLOCK_BYTES, size - done)])
        os.fsync(sink.fileno())
    return read_s, time.perf_counter() - start


def read_file(file: Path) -> bytearray:
    """Read it to nowhere; returns the last block."""
    buffer = bytearray(BLOCK_BYTES)
    with file.open("rb", buffering=0) as source:
        while source.readinto(buffer):
            pass
    return buffer


def read_all(folder: Path) -> None:
    """So that it is in the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            read_file(path)


def _sync(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
