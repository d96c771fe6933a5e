"""Blocks: the records of all sources, cut into the units of work and of resuming."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from jaxserve.trainer.data.encoding import Item
from jaxserve.trainer.data.errors import DataError
from jaxserve.trainer.data.sources import (
    PIECE_CHARACTERS,
    Place,
    Record,
    SourceFile,
    SourceReader,
    cut_place,
)

BLOCK_CHARACTERS = PIECE_CHARACTERS
BLOCK_RECORDS = 512


@dataclass(frozen=True, slots=True)
class Position:
    """How far reading has come: everything before it is done.

    Attributes:
        source: index of the source file.
        records: of that file that are done whole.
        pieces: of the next record that are done.
    """

    source: int = 0
    records: int = 0
    pieces: int = 0


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive records of one source.

    Attributes:
        places: where each comes from.
        starts: whether each begins a document.
        end: the position after the block.
        bytes_read: of its source, on the disk.
        source_sha256: the source's digest, when the block is its last one.
    """

    places: tuple[Place, ...]
    starts: tuple[bool, ...]
    end: Position
    bytes_read: int
    source_sha256: str | None


def read_blocks(
    sources: Sequence[SourceFile], field: str, begin: Position
) -> Iterator[tuple[Block, list[Item]]]:
    """All blocks from `begin` on. Their edges follow from the sources alone.

    Raises DataError: a malformed source, or one that changed while it was read.
    """
    for index in range(begin.source, len(sources)):
        here = begin if index == begin.source else Position(index)
        yield from _source_blocks(sources[index], field, here)


def _source_blocks(
    source: SourceFile, field: str, begin: Position
) -> Iterator[tuple[Block, list[Item]]]:
    reader = SourceReader(source, field)
    records: list[Record] = []
    size = 0
    end = begin
    for record, end in _pieces(reader, begin):
        records.append(record)
        size += _characters(record)
        if size >= BLOCK_CHARACTERS or len(records) >= BLOCK_RECORDS:
            yield _block(records, end, reader.bytes_read, None)
            records, size = [], 0
    status = source.path.stat()
    if (status.st_size, status.st_mtime_ns) != (source.num_bytes, source.mtime_ns):
        raise DataError(f"{source.path} changed while it was read; run the command again")
    yield _block(records, Position(begin.source + 1), source.num_bytes, reader.sha256())


def _pieces(reader: SourceReader, begin: Position) -> Iterator[tuple[Record, Position]]:
    """Records, long texts cut to pieces, each with the position after it."""
    num_records, skip = begin.records, begin.pieces
    for record in reader.records(skip=begin.records):
        pieces = _cut(record)
        for number, piece in enumerate(pieces):
            if number < skip:
                continue
            is_last = number == len(pieces) - 1
            after = (num_records + 1, 0) if is_last else (num_records, number + 1)
            yield piece, Position(begin.source, *after)
        num_records, skip = num_records + 1, 0


def _cut(record: Record) -> list[Record]:
    if not isinstance(record.value, str) or len(record.value) <= 2 * PIECE_CHARACTERS:
        return [record]
    pieces = []
    rest = record.value
    while rest:
        stop = len(rest)
        if stop > 2 * PIECE_CHARACTERS:
            stop = cut_place(rest[:PIECE_CHARACTERS])
        pieces.append(replace(record, value=rest[:stop], is_start=False, is_end=False))
        rest = rest[stop:]
    pieces[0] = replace(pieces[0], is_start=record.is_start)
    pieces[-1] = replace(pieces[-1], is_end=record.is_end)
    return pieces


def _characters(record: Record) -> int:
    if isinstance(record.value, str):
        return len(record.value)
    if isinstance(record.value, list):
        return sum(len(str(message)) for message in record.value)
    return 1


def _block(
    records: Sequence[Record], end: Position, bytes_read: int, sha256: str | None
) -> tuple[Block, list[Item]]:
    block = Block(
        places=tuple(record.place for record in records),
        starts=tuple(record.is_start for record in records),
        end=end,
        bytes_read=bytes_read,
        source_sha256=sha256,
    )
    return block, [Item(record.value, record.is_start, record.is_end) for record in records]
