"""Stream: batches of windows go through reading, hashing, writing and reading back, each in
threads of its own, in order and in bounded memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from blake3 import blake3

from checkpoint.migrate.compute import compute_window
from checkpoint.migrate.errors import SourceChanged, VerificationFailed, naming
from checkpoint.migrate.journal import Journal, key_of
from checkpoint.migrate.parts import PartSource
from checkpoint.migrate.plan import Plan, Window
from checkpoint.migrate.read_back import ReadBack
from checkpoint.migrate.target import Piece, Target
from checkpoint.store.digests import array_hash
from checkpoint.store.direct_file import bytes_of

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
    read_back: ReadBack,
    on_window: OnWindow,
) -> dict[str, str]:
    """Write every window that is not there yet, and read it back.

    Windows that the journal has are computed again, and must come to the same.

    Returns:
        BLAKE3 of each array, as `checkpoint.store` defines it: see `array_hash`.

    Raises:
        SourceChanged: a window comes to something else than the journal says.
        VerificationFailed: a window, read back, is not what was written.
        WriteFailed: the system refuses to read or write; the message names the array.
        MigrationError, FormatError: see `compute_window`.
    """
    prefixes = _Prefixes(journal)
    with (
        ThreadPoolExecutor(num_workers, thread_name_prefix="migrate-read") as readers,
        ThreadPoolExecutor(1, thread_name_prefix="migrate-write") as writer,
    ):
        writing: Future[_Written] | None = None

        def settle() -> None:
            if writing is None:
                return
            written = writing.result()
            for hashed, is_new in zip(written.pieces, written.is_new, strict=True):
                if is_new:
                    journal.append(hashed.window, hashed.prefix)
            target.add([hashed.piece for hashed in written.pieces])
            for hashed, is_new in zip(written.pieces, written.is_new, strict=True):
                on_window(hashed.window.num_bytes, is_new)

        for pieces in _computed(readers, plan.batches(source), source, target, max_in_flight):
            batch = [prefixes.take(piece) for piece in pieces]  # While the one before is written.
            settle()
            writing = writer.submit(_write, target, batch, read_back)
        settle()
    return prefixes.digests


@dataclass(frozen=True, slots=True)
class _Hashed:
    """A window's values, the digest of its array up to its end, and whether that is known."""

    piece: Piece
    prefix: str
    is_known: bool

    @property
    def window(self) -> Window:
        return self.piece[0]


@dataclass(frozen=True, slots=True)
class _Written:
    """A batch that is in the target, and which windows were not there before."""

    pieces: list[_Hashed]
    is_new: list[bool]


class _Prefixes:
    """Digests of arrays up to each window, held against the journal."""

    def __init__(self, journal: Journal) -> None:
        self.digests: dict[str, str] = {}
        self._journal = journal
        self._hash = blake3()

    def take(self, piece: Piece) -> _Hashed:
        window, values = piece
        array = window.array
        if window.part_index == window.start == 0:
            self._hash = array_hash(array.dtype, array.shape)
        self._hash.update(bytes_of(values).data)
        prefix = self._hash.hexdigest()
        known = self._journal.done.get(key_of(window))
        if known is not None and known != prefix:
            raise SourceChanged(
                f"{array.name}: the source no longer gives what was written of it before the "
                "interruption; pass --restart to begin anew"
            )
        if window.is_last:
            self.digests[array.name] = prefix
        return _Hashed(piece, prefix, known is not None)


def _write(target: Target, batch: list[_Hashed], read_back: ReadBack) -> _Written:
    # A journalled window may be lost all the same: a power failure can do that.
    known = [hashed.piece for hashed in batch if hashed.is_known]
    there = iter(target.holds(known))
    is_new = [not hashed.is_known or not next(there) for hashed in batch]
    new = [hashed.piece for hashed, is_wanted in zip(batch, is_new, strict=True) if is_wanted]
    target.write(new)
    for (window, _), is_there in zip(new, target.holds(new, read_back), strict=True):
        if not is_there:
            raise VerificationFailed(
                f"{window.array.name}, read back from the target, is not what was written; is "
                "the disk sound? Nothing was published"
            )
    return _Written(batch, is_new)


def _computed(
    pool: ThreadPoolExecutor,
    batches: Iterable[tuple[Window, ...]],
    source: PartSource,
    target: Target,
    max_in_flight: int,
) -> Iterator[list[Piece]]:
    """Batches with their values, in order; at most `max_in_flight` are in memory."""
    pending: deque[Future[list[Piece]]] = deque()
    try:
        for batch in batches:
            pending.append(pool.submit(_compute, batch, source, target))
            if len(pending) >= max_in_flight:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        for future in pending:
            future.cancel()


def _compute(batch: tuple[Window, ...], source: PartSource, target: Target) -> list[Piece]:
    pieces = []
    for window in batch:
        with naming(window.array.name, "read"):
            pieces.append((window, compute_window(window, source, target.buffer(window))))
    return pieces
