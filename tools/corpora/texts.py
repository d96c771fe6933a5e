"""Plain text of the packages, a record a document."""

from __future__ import annotations

import gzip
import string
from collections.abc import Iterator
from pathlib import Path

PAGE_BYTES = 8000
DICTD_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"

Record = dict[str, str]


def speeches(package: Path) -> Iterator[Record]:
    """One State of the Union address a document, oldest first; `id` is year and president."""
    for file in sorted((package / "data").glob("*.txt")):
        yield {"id": file.stem, "text": file.read_text(encoding="utf-8").strip()}


def chapters(package: Path) -> Iterator[Record]:
    """One chapter of the novel a document, in order."""
    files = (package / "data").glob("chapter_*.txt")
    for file in sorted(files, key=lambda path: int(path.stem.removeprefix("chapter_"))):
        yield {"id": file.stem, "text": file.read_text(encoding="utf-8").strip()}


def dictionary_pages(package: Path) -> Iterator[Record]:
    """Entries of a dictd dictionary in their order in the file, joined to pages of at least
    PAGE_BYTES, so that a document is longer than one entry."""
    folder = package / "usr" / "share" / "dictd"
    text = gzip.decompress((folder / "gcide.dict.dz").read_bytes())
    entries: list[bytes] = []
    number = 0
    for start, length in _entries(folder / "gcide.index"):
        entries.append(text[start : start + length].strip())
        if sum(map(len, entries)) >= PAGE_BYTES:
            yield _page(number, entries)
            entries, number = [], number + 1
    if entries:
        yield _page(number, entries)


def _page(number: int, entries: list[bytes]) -> Record:
    return {"id": f"page_{number}", "text": b"\n\n".join(entries).decode("utf-8", "replace")}


def _entries(index: Path) -> list[tuple[int, int]]:
    """Distinct (start, length) of a dictd index; headwords that share an entry count once."""
    spans = set()
    for line in index.read_text(encoding="utf-8").splitlines():
        word, start, length = line.split("\t")
        if not word.startswith("00-"):
            spans.add((_base64_number(start), _base64_number(length)))
    return sorted(spans)


def _base64_number(digits: str) -> int:
    """dictd writes numbers in base 64, most significant digit first."""
    value = 0
    for digit in digits:
        value = value * 64 + DICTD_DIGITS.index(digit)
    return value
