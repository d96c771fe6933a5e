"""seal: rows, digests and the manifest of finished token files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.trainer.data.cache_format import (
    DOCUMENT_START,
    MANIFEST_NAME,
    FileDigest,
    Manifest,
    SplitManifest,
)
from jaxserve.trainer.data.encode_sources import splits_of
from jaxserve.trainer.data.encoding import tokenizer_digest
from jaxserve.trainer.data.errors import DataError
from jaxserve.trainer.data.journal import Journal, sync_folder
from jaxserve.trainer.data.packing import write_rows
from jaxserve.trainer.data.prepare_config import PrepareConfig
from jaxserve.trainer.data.sources import SourceFile
from models.tokenizer import Tokenizer

_DIGEST_BLOCK_BYTES = 1 << 20


def token_type_of(vocab_size: int) -> np.dtype[Any]:
    """The smallest type of tokens.bin that holds every id."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def seal(
    config: PrepareConfig,
    sources: Sequence[SourceFile],
    work: Path,
    tokenizer: Tokenizer,
    token_type: np.dtype[Any],
    journal: Journal,
) -> Manifest:
    """Makes the rows of each split and writes the manifest into `work`, all on the disk.

    Raises DataError: a split has no rows.
    """
    splits = {
        split: _seal_split(config, work / split, token_type, journal) for split in splits_of(config)
    }
    manifest = Manifest(
        kind=config.kind,
        seq_len=config.seq_len,
        vocab_size=tokenizer.vocab_size,
        token_dtype="uint16" if token_type.itemsize == 2 else "uint32",
        tokenizer_sha256=tokenizer_digest(tokenizer),
        options=config.content_options(),
        sources=tuple(
            {"name": source.path.name, "num_bytes": source.num_bytes, "sha256": digest}
            for source, digest in zip(sources, journal.source_sha256, strict=True)
        ),
        counts=dict(journal.counts),
        splits=splits,
    )
    path = work / MANIFEST_NAME
    path.write_bytes(manifest.to_bytes())
    _sync_file(path)
    for file in (work / "tokenizer").iterdir():
        _sync_file(file)
    return manifest


def _seal_split(
    config: PrepareConfig, folder: Path, token_type: np.dtype[Any], journal: Journal
) -> SplitManifest:
    num_tokens = (folder / "tokens.bin").stat().st_size // token_type.itemsize
    num_documents = (folder / "documents.bin").stat().st_size // DOCUMENT_START.itemsize
    num_examples, num_targets = write_rows(
        folder,
        num_tokens=num_tokens,
        seq_len=config.seq_len,
        is_chat=config.kind == "chat",
        pack=config.pack,
    )
    if not num_targets:
        raise _empty_split(folder.name, config, journal)
    files = {path.name: _digest(path) for path in sorted(folder.iterdir())}
    sync_folder(folder)
    return SplitManifest(num_examples, num_documents, num_tokens, num_targets, files)


def _empty_split(split: str, config: PrepareConfig, journal: Journal) -> DataError:
    left_out = ", ".join(f"{reason} {number}" for reason, number in journal.counts.items())
    if split == "eval":
        return DataError(
            f"--eval-fraction {config.eval_fraction} of {journal.num_documents} documents left "
            "nothing for the eval split; raise it, or give 0 for no eval split"
        )
    return DataError(
        f"the sources hold nothing to train on: {journal.num_documents} documents"
        + (f", left out: {left_out}" if left_out else "")
    )


def _digest(path: Path) -> FileDigest:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_DIGEST_BLOCK_BYTES):
            digest.update(block)
        os.fsync(file.fileno())
    return FileDigest(path.stat().st_size, digest.hexdigest())


def _sync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
