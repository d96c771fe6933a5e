"""A data set of random tokens, in the files that `jaxserve data prepare` writes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from jaxserve.trainer.data.cache_format import MANIFEST_NAME, ROW, FileDigest, Manifest
from jaxserve.trainer.data.cache_format import SplitManifest as Split


def make_dataset(
    folder: Path, *, num_examples: int = 90, seq_len: int = 16, vocab_size: int = 257, seed: int = 0
) -> Path:
    """Writes it; one document, rows without padding."""
    random = np.random.default_rng(seed)
    manifest = Manifest(
        kind="text",
        seq_len=seq_len,
        vocab_size=vocab_size,
        token_dtype="uint16",
        tokenizer_sha256="0" * 64,
        options={},
        sources=(),
        counts={},
        splits={
            split: _make_split(folder / split, number, seq_len, vocab_size, random)
            for split, number in (("train", num_examples), ("eval", 6))
        },
    )
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    return folder


def _make_split(
    folder: Path, num_examples: int, seq_len: int, vocab_size: int, random: np.random.Generator
) -> Split:
    folder.mkdir(parents=True)
    num_tokens = num_examples * seq_len + 1
    rows = np.zeros(num_examples, ROW)
    rows["start"] = np.arange(num_examples) * seq_len
    rows["num_tokens"] = seq_len + 1
    rows["num_targets"] = seq_len
    # Words of a few tokens each, so that there is something to learn.
    words = random.integers(1, vocab_size, (16, 5))
    tokens = words[random.integers(0, 16, num_tokens // 5 + 1)].reshape(-1)[:num_tokens]
    contents = {
        "tokens.bin": tokens.astype("<u2").tobytes(),
        "documents.bin": np.zeros(1, "<i8").tobytes(),
        "rows.bin": rows.tobytes(),
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    digests = {
        name: FileDigest(len(content), hashlib.sha256(content).hexdigest())
        for name, content in contents.items()
    }
    return Split(num_examples, 1, num_tokens, num_examples * seq_len, digests)
