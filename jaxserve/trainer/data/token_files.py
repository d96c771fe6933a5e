"""Files of tokens that grow, document by document, and can be cut back to a known point."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from jaxserve.trainer.data.cache_format import DOCUMENT_START, WEIGHT


@dataclass(frozen=True, slots=True)
class SplitSizes:
    """How far a split's files have grown."""

    num_tokens: int = 0
    num_documents: int = 0


class SplitWriter:
    """Appends documents to one split's tokens.bin, documents.bin and, for chats, weights.bin.

    Args:
        folder: the split's; made if missing.
        token_type: of tokens.bin.
        has_weights: whether there is a weights.bin.
        sizes: what is kept of files that are there; the rest is cut off.

    Raises OSError: disk full, or files shorter than `sizes` say.
    """

    def __init__(
        self, folder: Path, token_type: np.dtype[Any], has_weights: bool, sizes: SplitSizes
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._token_type = token_type
        self._num_tokens = sizes.num_tokens
        self._num_documents = sizes.num_documents
        self._tokens = _open_at(folder / "tokens.bin", sizes.num_tokens * token_type.itemsize)
        self._documents = _open_at(
            folder / "documents.bin", sizes.num_documents * DOCUMENT_START.itemsize
        )
        self._weights = (
            _open_at(folder / "weights.bin", sizes.num_tokens * WEIGHT.itemsize)
            if has_weights
            else None
        )

    @property
    def sizes(self) -> SplitSizes:
        return SplitSizes(self._num_tokens, self._num_documents)

    def append(
        self,
        tokens: npt.NDArray[np.uint32],
        weights: npt.NDArray[np.uint8],
        *,
        is_start: bool,
    ) -> None:
        """Adds a document (`is_start`), or goes on with the last one."""
        if is_start:
            self._documents.write(np.array([self._num_tokens], DOCUMENT_START).tobytes())
            self._num_documents += 1
        self._tokens.write(tokens.astype(self._token_type).tobytes())
        if self._weights is not None:
            self._weights.write(weights.tobytes())
        self._num_tokens += len(tokens)

    def sync(self) -> None:
        """Forces all that was appended to the disk."""
        for file in self._files():
            file.flush()
            os.fsync(file.fileno())

    def _files(self) -> list[IO[bytes]]:
        files = [self._tokens, self._documents]
        return files if self._weights is None else [*files, self._weights]

    def __enter__(self) -> SplitWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in self._files():
            file.close()


def _open_at(path: Path, num_bytes: int) -> IO[bytes]:
    file = path.open("r+b" if path.exists() else "w+b")
    if file.seek(0, os.SEEK_END) < num_bytes:
        file.close()
        raise OSError(f"{path} is shorter than its journal says")
    file.truncate(num_bytes)
    file.seek(num_bytes)
    return file
