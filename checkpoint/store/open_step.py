"""One committed step held open: its arrays are read one at a time, or part by part."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from checkpoint.store.durable import sha256_hex
from checkpoint.store.errors import CorruptStep, Problem, StoreUnreadable
from checkpoint.store.layout import ARRAYS
from checkpoint.store.manifest import ArrayRecord, Manifest
from checkpoint.store.orbax_io import ArrayReader
from checkpoint.store.tree import HostArray
from checkpoint.store.verification import read_array


class OpenStep:
    """What `StoreReader.open_step` returns; a context manager.

    While it is open the writer of the store does not delete the step.

    Attributes:
        folder: the step's folder.
        step: its number.
    """

    def __init__(self, folder: Path, manifest: Manifest, lock: BinaryIO | None) -> None:
        self.folder = folder
        self.step = manifest.step
        self._manifest = manifest
        self._reader = ArrayReader(folder / ARRAYS)
        self._lock = lock

    def __enter__(self) -> OpenStep:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the step."""
        if self._lock is not None:
            self._lock.close()

    @property
    def arrays(self) -> Mapping[str, ArrayRecord]:
        """Shape, dtype and digest of every array, by name."""
        return self._manifest.arrays

    @property
    def digest(self) -> str:
        """SHA-256 of the step's manifest: names every value in it."""
        return sha256_hex(self._manifest.encode())

    @property
    def metadata(self) -> Mapping[str, Any]:
        """What was saved with the step."""
        return self._manifest.metadata

    def read(self, name: str) -> HostArray:
        """All values of one array, after their digest was found right.

        Raises:
            CorruptStep: they are not those that were saved.
            StoreUnreadable: the system refuses to read.
        """
        try:
            return read_array(self._reader, name, self._manifest.arrays[name])
        except StoreUnreadable:
            raise
        except ValueError as error:
            raise CorruptStep(self.step, [Problem(f"array {name}", str(error))]) from error

    def read_part(self, name: str, part: tuple[slice, ...]) -> HostArray:
        """The values of a part of one array, which no digest covers: the caller checks.

        Raises:
            CorruptStep: the files cannot be understood.
            StoreUnreadable: the system refuses to read.
        """
        try:
            return self._reader.read_part(name, part)
        except StoreUnreadable:
            raise
        except (ValueError, OSError) as error:
            raise CorruptStep(self.step, [Problem(f"array {name}", str(error))]) from error

    def read_into(self, name: str, part: tuple[slice, ...], out: HostArray) -> None:
        """As `read_part`, with a slice for each axis, into memory of that shape and dtype."""
        try:
            self._reader.read_into(name, part, out)
        except StoreUnreadable:
            raise
        except (ValueError, OSError) as error:
            raise CorruptStep(self.step, [Problem(f"array {name}", str(error))]) from error

    def chunk_shape(self, name: str) -> tuple[int, ...]:
        """How an array is divided into pieces that are read as a whole."""
        return self._reader.chunk_shape(name)
