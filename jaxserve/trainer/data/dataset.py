"""TokenDataset: the examples of a prepared data set by id, memory-mapped."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxserve.trainer.data.cache_format import (
    DOCUMENT_START,
    ROW,
    WEIGHT,
    Manifest,
    SplitManifest,
    read_manifest,
)
from jaxserve.trainer.data.errors import DataError
from jaxserve.trainer.data.rows import Rows

Int64Array = npt.NDArray[np.int64]

_DIGEST_BLOCK_BYTES = 1 << 20


class TokenDataset:
    """One split of a prepared data set. Threads may read at the same time.

    Opening verifies the manifest's digest and every file's size; `verify` reads
    everything.

    Args:
        folder: what `jaxserve data prepare --out` wrote.
        split: "train" or "eval".

    Attributes:
        fingerprint: SHA-256, hex, of all that decides what `read` returns.
        num_examples: ids are 0 .. num_examples - 1; at least 1.
        seq_len: positions a row, T.
        vocab_size: every token id is below it.
        manifest: sources, options and counts of the whole data set.

    Raises DataError: no data set, no such split, damaged or cut short.
    """

    def __init__(self, folder: str | os.PathLike[str], split: str = "train") -> None:
        self.folder = Path(folder)
        self.split = split
        self.manifest: Manifest = read_manifest(self.folder)
        if split not in self.manifest.splits:
            raise DataError(
                f"{self.folder} has no split {split!r}, only {', '.join(self.manifest.splits)}; "
                "`jaxserve data prepare --eval-fraction` above 0 makes an eval split"
            )
        self._sizes: SplitManifest = self.manifest.splits[split]
        self.fingerprint: str = self.manifest.fingerprint(split)
        self.num_examples: int = self._sizes.num_examples
        self.seq_len: int = self.manifest.seq_len
        self.vocab_size: int = self.manifest.vocab_size
        self._tokens = self._map("tokens.bin", self.manifest.token_type)
        self._rows = self._map("rows.bin", ROW)
        self._documents = self._map("documents.bin", DOCUMENT_START)
        self._weights = (
            self._map("weights.bin", WEIGHT) if "weights.bin" in self._sizes.files else None
        )

    def __len__(self) -> int:
        return self.num_examples

    def target_counts(self, ids: Int64Array) -> npt.NDArray[np.int32]:
        """How many targets count in the loss, for each of `ids` (int64 [n]): int32 [n].

        Comes from the index; no tokens are read. Raises DataError for an id out of range.
        """
        self._check_ids(ids)
        return self._rows["num_targets"][ids].astype(np.int32)

    def read(self, ids: Int64Array) -> Rows:
        """The rows of `ids` (int64 [n]), in their order.

        Raises DataError for an id out of range, or a row that leaves the file (damage).
        """
        self._check_ids(ids)
        num_rows, width = len(ids), self.seq_len + 1
        tokens = np.zeros((num_rows, width), np.int32)
        segments = np.zeros((num_rows, width), np.int32)
        positions = np.zeros((num_rows, width), np.int32)
        is_target = np.zeros((num_rows, width), np.uint8)
        records = self._rows[ids]
        self._check_records(records)
        for row, (start, length, _) in enumerate(records.tolist()):
            stop = start + length
            tokens[row, :length] = self._tokens[start:stop]
            segments[row, :length], positions[row, :length] = self._segments(start, stop)
            is_target[row, :length] = self._is_target(start, stop)
        padding = segments[:, 1:] == 0
        same_segment = segments[:, 1:] == segments[:, :-1]
        weights = np.where(same_segment & ~padding, is_target[:, 1:], 0).astype(np.uint8)
        # The last token of a short row is a target only: as an input it would predict padding.
        segment_ids = np.where(padding, 0, segments[:, :-1]).astype(np.int32)
        return Rows(
            inputs=np.where(padding, 0, tokens[:, :-1]).astype(np.int32),
            targets=tokens[:, 1:].copy(),
            weights=weights,
            segment_ids=segment_ids,
            positions=np.where(padding, 0, positions[:, :-1]).astype(np.int32),
        )

    def verify(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Reads every byte of the split and compares digests.

        Args:
            progress: called as `progress(done_bytes, total_bytes)`.

        Raises DataError that names the damaged file.
        """
        total = sum(digest.num_bytes for digest in self._sizes.files.values())
        done = 0
        for name, expected in self._sizes.files.items():
            path = self.folder / self.split / name
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while block := file.read(_DIGEST_BLOCK_BYTES):
                    digest.update(block)
                    done += len(block)
                    if progress is not None:
                        progress(done, total)
            if digest.hexdigest() != expected.sha256:
                raise DataError(
                    f"{path} is damaged: its SHA-256 is {digest.hexdigest()}, not "
                    f"{expected.sha256}; prepare the data set anew"
                )

    def _segments(
        self, start: int, stop: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Segment numbers from 1 and places within them of tokens `start` .. `stop - 1`."""
        first = int(np.searchsorted(self._documents, start, side="right"))
        last = int(np.searchsorted(self._documents, stop, side="left"))
        begins = np.asarray(self._documents[first:last], np.int64) - start
        is_begin = np.zeros(stop - start, np.int32)
        is_begin[begins] = 1
        segments = 1 + np.cumsum(is_begin, dtype=np.int32)
        origins = np.concatenate([[0], begins])
        positions = np.arange(stop - start) - origins[segments - 1]
        return segments, positions.astype(np.int32)

    def _is_target(self, start: int, stop: int) -> npt.NDArray[np.uint8]:
        if self._weights is None:
            return np.ones(stop - start, np.uint8)
        return self._weights[start:stop]

    def _check_ids(self, ids: Int64Array) -> None:
        if ids.ndim != 1 or ids.dtype != np.int64:
            raise TypeError(f"ids must be int64 [n], not {ids.dtype} {list(ids.shape)}")
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.num_examples:
            raise DataError(f"example ids must be from 0 to {self.num_examples - 1}")

    def _check_records(self, records: npt.NDArray[Any]) -> None:
        starts, lengths = records["start"], records["num_tokens"].astype(np.int64)
        is_inside = (starts >= 0) & (lengths >= 2) & (lengths <= self.seq_len + 1)
        is_inside &= starts + lengths <= len(self._tokens)
        if not is_inside.all():
            raise DataError(
                f"{self.folder / self.split / 'rows.bin'} is damaged: a row leaves the tokens; "
                "prepare the data set anew"
            )

    def _map(self, name: str, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
        path = self.folder / self.split / name
        expected = self._sizes.files[name].num_bytes
        try:
            found = path.stat().st_size
        except FileNotFoundError:
            raise DataError(f"{path} is missing; prepare the data set anew") from None
        if found != expected:
            raise DataError(
                f"{path} has {found} bytes, not {expected}: it was cut or replaced; "
                "prepare the data set anew"
            )
        return np.memmap(path, dtype=dtype, mode="r") if found else np.empty(0, dtype)
