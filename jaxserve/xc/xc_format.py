"""Readers of the Extreme Classification Repository's text formats.

`*.json.gz` (or `.json`): a JSON object a line, of a point (`trn`, `tst`) or a label (`lbl`). Its
fields: `uid`, `title`, `content`, and of a point `target_ind`, the lines of its labels in `lbl`.

Sparse `*.txt`: a header with the numbers of rows and columns, then a row a line, `column:value`
separated by spaces. Bag-of-words files have three numbers in the header (rows, features, labels)
and the row's labels, separated by commas, before its features.

`*.raw.txt`: a text a line. `filter_labels_*.txt`: a pair `point label` a line, not to be counted.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from jaxserve.xc.errors import XcDataError
from jaxserve.xc.label_sets import LabelSets


@dataclass(frozen=True, slots=True)
class TextRecord:
    """A point or a label.

    Attributes:
        uid: of whoever made the data.
        text: title and content, separated by a space.
        label_ids: of a point, lines of its labels; empty for a label.
    """

    uid: str
    text: str
    label_ids: tuple[int, ...]


def read_records(path: Path) -> Iterator[TextRecord]:
    """The records of a JSON file, in order.

    Raises:
        XcDataError: names file and line.
    """
    for number, line in enumerate(_lines(path), 1):
        try:
            yield _record(json.loads(line), number)
        except (ValueError, TypeError) as error:
            raise XcDataError(
                f"{path}, line {number}: {error}. Each line must be a JSON object with uid, title, "
                "content and, for a point, target_ind"
            ) from None


def read_label_matrix(path: Path) -> LabelSets:
    """The labels of a sparse file's rows: all columns, or of a bag-of-words file its labels.

    Raises:
        XcDataError: names file and line.
    """
    lines = _lines(path)
    header = next(lines, "").split()
    if len(header) not in (2, 3) or not all(one.isdigit() for one in header):
        raise XcDataError(
            f"{path}, line 1: {' '.join(header)[:80]!r} is no header: two numbers (rows, columns) "
            "or three (rows, features, labels) must stand there"
        )
    num_rows, num_labels = int(header[0]), int(header[-1])
    is_bag = len(header) == 3
    rows = []
    for number, line in enumerate(lines, 2):
        try:
            rows.append(_bag_labels(line) if is_bag else _columns(line))
        except ValueError as error:
            raise XcDataError(f"{path}, line {number}: {error}") from None
    if len(rows) != num_rows:
        raise XcDataError(
            f"{path} has {len(rows)} rows, but its header says {num_rows}: get it anew"
        )
    try:
        return LabelSets.of(rows, num_labels)
    except ValueError as error:
        raise XcDataError(f"{path}: {error}, as its header says") from None


def read_texts(path: Path) -> list[str]:
    """The lines of a text file. Raises XcDataError: it cannot be read."""
    return list(_lines(path))


def read_pairs(path: Path) -> npt.NDArray[np.int32]:
    """The (point, label) pairs of a filter file, int32[n, 2].

    Raises:
        XcDataError: names file and line.
    """
    pairs = []
    for number, line in enumerate(_lines(path), 1):
        fields = line.split()
        if len(fields) != 2 or not all(one.isdigit() for one in fields):
            raise XcDataError(
                f"{path}, line {number}: two numbers must stand there, point and label"
            )
        pairs.append((int(fields[0]), int(fields[1])))
    return np.array(pairs, np.int32).reshape(-1, 2)


def _record(fields: Any, number: int) -> TextRecord:
    if not isinstance(fields, dict):
        raise TypeError("it is no object")
    title, content = fields.get("title", ""), fields.get("content", "")
    targets = fields.get("target_ind", [])
    if not isinstance(title, str) or not isinstance(content, str):
        raise TypeError("title and content must be text")
    if not isinstance(targets, list) or not all(type(one) is int and one >= 0 for one in targets):
        raise TypeError("target_ind must be a list of whole numbers")
    text = " ".join(f"{title} {content}".split())
    return TextRecord(str(fields.get("uid", number - 1)), text, tuple(targets))


def _columns(line: str) -> list[int]:
    columns = []
    for field in line.split():
        column, colon, value = field.partition(":")
        if not colon or not column.isdigit():
            raise ValueError(f"{field[:40]!r} must be column:value")
        if float(value) > 0:
            columns.append(int(column))
    return columns


def _bag_labels(line: str) -> list[int]:
    labels, _, _ = line.partition(" ")
    if ":" in labels:  # A row without labels begins with its features.
        return []
    return [int(label) for label in labels.split(",") if label]


def _lines(path: Path) -> Iterator[str]:
    try:
        with _open(path) as file:
            for line in file:
                yield line.rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise XcDataError(f"{path} cannot be read: {error}") from None


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
