"""Sources: the files that training text comes from, and their records one by one.

A record is remembered with its place, so that whatever is wrong with it later can name file
and line. Files are read front to back in bounded memory; a reader also yields how many bytes
of the file are behind it.
"""

from __future__ import annotations

import hashlib
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxserve.trainer.data.byte_stream import COMPRESSIONS, HashingFile, decompressed
from jaxserve.trainer.data.errors import DataError

FORMATS = ("text", "jsonl", "parquet")
_SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
MAX_LINE_BYTES = 64 << 20
PIECE_CHARACTERS = 1 << 18
"""A longer text is encoded in pieces, cut after a line or word."""
_HASH_BLOCK_BYTES = 1 << 20
_PARQUET_ROWS = 256


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read, of a known format."""

    path: Path
    format: str
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record stands, for messages."""

    path: Path
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.path}, {self.unit} {self.number}" if self.unit else str(self.path)


@dataclass(frozen=True, slots=True)
class Record:
    """One document, or one piece of a long text file.

    Attributes:
        place: file and line (or row).
        value: the text, or a conversation's list of messages.
        is_start, is_end: whether the document begins and ends with this record.
    """

    place: Place
    value: Any
    is_start: bool = True
    is_end: bool = True


def find_sources(paths: Sequence[Path], file_format: str = "auto") -> list[SourceFile]:
    """The files behind `paths` in order; a folder stands for its files, sorted by name.

    Raises DataError: nothing there, an unknown ending, or a folder without any known file.
    """
    found: list[SourceFile] = []
    for path in paths:
        if path.is_dir():
            files = sorted(item for item in path.rglob("*") if item.is_file())
            known = [item for item in files if _format_of(item, file_format) is not None]
            if not known:
                raise DataError(
                    f"{path} holds no file with a known ending ({', '.join(_SUFFIXES)}); "
                    "name files, or give --format"
                )
            found += [_source(item, file_format) for item in known]
        elif path.is_file():
            found.append(_source(path, file_format))
        else:
            raise DataError(f"{path} does not exist, or is no plain file")
    return found


def _source(path: Path, file_format: str) -> SourceFile:
    chosen = _format_of(path, file_format)
    if chosen is None:
        raise DataError(
            f"{path} has an ending that says no format; give --format {', '.join(FORMATS)}"
        )
    status = path.stat()
    return SourceFile(path, chosen, status.st_size, status.st_mtime_ns)


def _format_of(path: Path, file_format: str) -> str | None:
    if file_format != "auto":
        return file_format
    stem = path.with_suffix("") if path.suffix.lower() in COMPRESSIONS else path
    return _SUFFIXES.get(stem.suffix.lower())


class SourceReader:
    """Reads one source file front to back.

    Args:
        source: the file.
        field: name of the JSON field or Parquet column that holds the value.

    Attributes:
        bytes_read: of the file as it lies on the disk, so far.
    """

    def __init__(self, source: SourceFile, field: str) -> None:
        self.source = source
        self.field = field
        self._hash = hashlib.sha256()
        self._file: HashingFile | None = None
        self._parquet_bytes = 0

    @property
    def bytes_read(self) -> int:
        return self._file.bytes_read if self._file is not None else self._parquet_bytes

    def records(self, skip: int = 0) -> Iterator[Record]:
        """All records after the first `skip`, which are passed over without being decoded.

        Raises DataError with the place: not UTF-8, not JSON, no such field, too long a line,
        a file that cannot be decompressed.
        """
        try:
            if self.source.format == "parquet":
                yield from self._parquet_records(skip)
                return
            with self.source.path.open("rb") as raw:
                self._file = HashingFile(raw, self._hash)
                stream = decompressed(self._file, self.source.path.suffix)
                if self.source.format == "text":
                    yield from self._text_records(stream, skip)
                else:
                    yield from self._json_records(stream, skip)
                while self._file.read(_HASH_BLOCK_BYTES):
                    pass
        except (EOFError, zlib.error, OSError) as error:
            raise DataError(f"{self.source.path} cannot be read: {error}") from None

    def sha256(self) -> str:
        """The file's digest; valid once `records` has come to its end."""
        return self._hash.hexdigest()

    def _text_records(self, stream: IO[bytes], skip: int) -> Iterator[Record]:
        path = self.source.path
        text = io.TextIOWrapper(stream, encoding="utf-8", newline="")
        number, rest, line = 0, "", 1
        try:
            chunk = text.read(PIECE_CHARACTERS)
            while chunk or rest:
                following = text.read(PIECE_CHARACTERS) if chunk else ""
                pending = rest + chunk
                piece = pending if not following else pending[: cut_place(pending)]
                if number >= skip and piece:
                    yield Record(Place(path, "line", line), piece, number == 0, not following)
                line += piece.count("\n")
                number += 1
                rest, chunk = pending[len(piece) :], following
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, after line {line}: not valid UTF-8 ({error.reason}); convert the file "
                "with iconv, or remove it"
            ) from None
        finally:
            text.detach()  # else it would close the file, which is read to its end for the digest

    def _json_records(self, stream: IO[bytes], skip: int) -> Iterator[Record]:
        number, line_number = 0, 0
        for line in _lines(stream, self.source.path):
            line_number += 1
            if not line.strip():
                continue
            number += 1
            if number > skip:
                place = Place(self.source.path, "line", line_number)
                yield Record(place, self._json_value(line, place))

    def _json_value(self, line: bytes, place: Place) -> Any:
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not valid JSON: {error}; mend or remove the line") from None
        if not isinstance(fields, dict):
            raise DataError(f"{place}: a JSON object is needed, one a line")
        if self.field not in fields:
            names = ", ".join(map(repr, sorted(fields)[:8]))
            raise DataError(
                f"{place}: there is no field {self.field!r}, only {names}; name the right one "
                "with --field"
            )
        return fields[self.field]

    def _parquet_records(self, skip: int) -> Iterator[Record]:
        try:
            import pyarrow as arrow
            from pyarrow import parquet
        except ModuleNotFoundError:
            raise DataError(
                f"{self.source.path} needs pyarrow to be read; install jaxserve[data]"
            ) from None
        path = self.source.path
        try:
            self._hash_whole_file()
            with parquet.ParquetFile(path, memory_map=False) as file:
                if self.field not in file.schema_arrow.names:
                    names = ", ".join(map(repr, file.schema_arrow.names[:8]))
                    raise DataError(
                        f"{path}: there is no column {self.field!r}, only {names}; name the "
                        "right one with --field"
                    )
                row = 0
                total = max(1, file.metadata.num_rows)
                for batch in file.iter_batches(_PARQUET_ROWS, columns=[self.field]):
                    values = batch.column(0).to_pylist() if row + len(batch) > skip else []
                    for offset, value in enumerate(values):
                        if row + offset >= skip:
                            yield Record(Place(path, "row", row + offset), value)
                    row += len(batch)
                    self._parquet_bytes = self.source.num_bytes * row // total
        except arrow.ArrowException as error:
            raise DataError(f"{path} is not a readable Parquet file: {error}") from None

    def _hash_whole_file(self) -> None:
        with self.source.path.open("rb") as file:
            while block := file.read(_HASH_BLOCK_BYTES):
                self._hash.update(block)


def _lines(stream: IO[bytes], path: Path) -> Iterator[bytes]:
    number = 0
    while line := stream.readline(MAX_LINE_BYTES):
        number += 1
        if len(line) == MAX_LINE_BYTES:
            raise DataError(
                f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB; is this "
                "really a file with one JSON object a line?"
            )
        yield line


def cut_place(text: str) -> int:
    """Where to cut `text` near its end: after the last line, else word, else anywhere but
    never inside a \\r\\n."""
    for separator in ("\n", " "):
        place = text.rfind(separator, len(text) // 2) + 1
        if place > 0:
            return place
    return len(text) - 1 if text.endswith("\r") else len(text)
