"""Stream: windows are computed by several readers and written in order, in bounded memory."""

from __future__ import annotations

import contextlib
import hashlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from checkpoint.migrate.compute import compute_window
from checkpoint.migrate.errors import SourceChanged, VerificationFailed, WriteFailed
from checkpoint.migrate.journal import Journal, key_of
from checkpoint.migrate.parts import PartSource
from checkpoint.migrate.plan import Plan, PlannedArray, Window
from checkpoint.migrate.target import Target

Array: TypeAlias = npt.NDArray[Any]


OnWindow: TypeAlias = Callable[[int, bool], None]
"""Called as `on_window(num_bytes, was_written)`, from the thread that streams."""


def stream(
    plan: Plan,
    source: PartSource,
    target: Target,
    journal: Journal,
    *,
    num_workers: int,
    max_in_flight: int,
    on_window: OnWindow,
) -> dict[str, str]:
    """Write every window that is not there yet, and read back each that is written.

    Windows that the journal has are computed again, and must come to the same.

    Returns:
        SHA-256 of each array, as `checkpoint.store` defines it: see `array_hash`.

    Raises:
        SourceChanged: a window comes to something else than the journal says.
        VerificationFailed: a window, read back, is not what was written.
        WriteFailed: the system refuses to read or write; the message names the array.
        MigrationError, FormatError: see `compute_window`.
    """
    digests: dict[str, str] = {}
    with ThreadPoolExecutor(num_workers, thread_name_prefix="migrate-read") as pool:
        hashed = hashlib.sha256()
        for window, values in _computed(pool, plan.windows(source), source, max_in_flight):
            array = window.array
            if window.part_index == window.start == 0:
                hashed = array_hash(array)
            hashed.update(values.reshape(-1).view(np.uint8).data)
            prefix = hashed.hexdigest()
            known = journal.done.get(key_of(window))
            if known is not None and known != prefix:
                raise SourceChanged(
                    f"{array.name}: the source no longer gives what was written of it before the "
                    "interruption; pass --restart to begin anew"
                )
            with _naming(array, "written"):
                # A journalled window may be lost all the same: a power failure can do that.
                is_there = known is not None and target.holds(window, values)
                if not is_there:
                    _write(target, window, values)
                    journal.append(window, prefix)
                target.add(window, values)
            if window.is_last:
                digests[array.name] = prefix
            on_window(window.num_bytes, not is_there)
    return digests


def _write(target: Target, window: Window, values: Array) -> None:
    target.write(window, values)
    if not target.holds(window, values):
        raise VerificationFailed(
            f"{window.array.name}, read back from the target, is not what was written; is the "
            "disk sound? Nothing was published"
        )


def array_hash(array: PlannedArray) -> Any:
    """A SHA-256 that has taken in the array's dtype and shape; its bytes come next."""
    shape = ",".join(str(size) for size in array.shape)
    return hashlib.sha256(f"{array.dtype}[{shape}]\n".encode())


def _computed(
    pool: ThreadPoolExecutor, windows: Iterable[Window], source: PartSource, max_in_flight: int
) -> Iterator[tuple[Window, Array]]:
    """Windows with their values, in order; at most `max_in_flight` are in memory."""
    pending: deque[tuple[Window, Future[Array]]] = deque()
    try:
        for window in windows:
            pending.append((window, pool.submit(_compute, window, source)))
            if len(pending) >= max_in_flight:
                yield _first(pending)
        while pending:
            yield _first(pending)
    finally:
        for _, future in pending:
            future.cancel()


def _first(pending: deque[tuple[Window, Future[Array]]]) -> tuple[Window, Array]:
    window, future = pending.popleft()
    return window, future.result()


def _compute(window: Window, source: PartSource) -> Array:
    with _naming(window.array, "read"):
        return compute_window(window, source)


@contextlib.contextmanager
def _naming(array: PlannedArray, what: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WriteFailed(
            f"{array.name} cannot be {what}: {error}. What is done is kept: run the same command "
            "again once that is mended"
        ) from error
