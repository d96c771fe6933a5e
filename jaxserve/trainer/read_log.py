"""Writes down which examples a trainer really reads: the record that the ledger is held against."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt


class LoggedDataset:
    """A data set that logs every read, one JSON line each: generation, rank, ids."""

    def __init__(self, dataset: Any, log_dir: Path, generation: int, rank: int) -> None:
        """
        Args:
            dataset: what reads.
            log_dir: folder of `reads-gGENERATION-rRANK.jsonl`.
            generation, rank: of the trainer.
        """
        self._dataset = dataset
        self._said = {"generation": generation, "rank": rank}
        path = log_dir / f"reads-g{generation:04d}-r{rank}.jsonl"
        self._file = path.open("a", encoding="utf-8")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dataset, name)

    def read(self, ids: npt.NDArray[np.int64]) -> Any:
        """As the data set's."""
        rows = self._dataset.read(ids)
        self._file.write(json.dumps({**self._said, "ids": ids.tolist()}) + "\n")
        self._file.flush()
        return rows
