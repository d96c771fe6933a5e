"""Packing: from documents to rows, the examples of a split.

Text: the tokens of all documents are one stream, cut every T tokens into rows of T + 1, so
that each token but a document's first is a target exactly once. Chats are never cut: each
row takes the following conversations while they fit. The last row may be short.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from jaxserve.trainer.data.cache_format import DOCUMENT_START, ROW, WEIGHT

_CHUNK_TOKENS = 1 << 20
"""Tokens whose rows are made at once, which bounds the memory."""

Int64Array = npt.NDArray[np.int64]


def write_rows(
    folder: Path, *, num_tokens: int, seq_len: int, is_chat: bool, pack: bool
) -> tuple[int, int]:
    """Writes rows.bin from the other files of a split, in bounded memory.

    Returns the number of rows and the number of targets in all.
    """
    documents = _map(folder / "documents.bin", DOCUMENT_START)
    weights = _map(folder / "weights.bin", WEIGHT) if is_chat else None
    num_rows, num_targets = 0, 0
    chunk_rows = max(1, _CHUNK_TOKENS // (seq_len + 1))
    with (folder / "rows.bin").open("wb") as file:
        edges = (
            _chat_edges(documents, num_tokens, seq_len + 1 if pack else 0, chunk_rows)
            if is_chat
            else _text_edges(num_tokens, seq_len, chunk_rows)
        )
        for starts, stops in edges:
            rows = np.zeros(len(starts), ROW)
            rows["start"] = starts
            rows["num_tokens"] = stops - starts
            rows["num_targets"] = _targets(starts, stops, documents, weights)
            num_rows += len(rows)
            num_targets += int(rows["num_targets"].sum())
            _write(file, rows)
    return num_rows, num_targets


def _text_edges(
    num_tokens: int, seq_len: int, chunk_rows: int
) -> Iterator[tuple[Int64Array, Int64Array]]:
    num_rows = max(0, -(-(num_tokens - 1) // seq_len))
    for first in range(0, num_rows, chunk_rows):
        starts = np.arange(first, min(first + chunk_rows, num_rows), dtype=np.int64) * seq_len
        yield starts, np.minimum(starts + seq_len + 1, num_tokens)


def _chat_edges(
    documents: npt.NDArray[Any], num_tokens: int, room: int, chunk_rows: int
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """`room`: tokens of a row that takes several conversations; 0: one a row."""
    starts: list[int] = []
    stops: list[int] = []
    for start, stop in _spans(documents, num_tokens, chunk_rows):
        if starts and stop - starts[-1] <= room:
            stops[-1] = stop
        elif len(starts) == chunk_rows:
            yield np.array(starts, np.int64), np.array(stops, np.int64)
            starts, stops = [start], [stop]
        else:
            starts.append(start)
            stops.append(stop)
    if starts:
        yield np.array(starts, np.int64), np.array(stops, np.int64)


def _spans(
    documents: npt.NDArray[Any], num_tokens: int, chunk_rows: int
) -> Iterator[tuple[int, int]]:
    for first in range(0, len(documents), chunk_rows):
        edges = documents[first : first + chunk_rows + 1].tolist()
        if first + chunk_rows >= len(documents):
            edges.append(num_tokens)
        yield from itertools.pairwise(edges)


def _targets(
    starts: Int64Array,
    stops: Int64Array,
    documents: npt.NDArray[Any],
    weights: npt.NDArray[Any] | None,
) -> Int64Array:
    """Targets that count, a row: not a row's first token, and not a document's."""
    if weights is not None:
        # A document's first token has weight 0 already, and rows begin with documents.
        first = int(starts[0])
        sums = np.concatenate([[0], np.cumsum(weights[first : int(stops[-1])], dtype=np.int64)])
        result: Int64Array = sums[stops - first] - sums[starts - first]
        return result
    begun = np.searchsorted(documents, stops, "left") - np.searchsorted(documents, starts, "right")
    return stops - starts - 1 - begun


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)


def _write(file: IO[bytes], rows: npt.NDArray[Any]) -> None:
    file.write(rows.tobytes())
