"""A text as numbers."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MAX_CHARACTERS = 128


@dataclass(frozen=True)
class Corpus:
    """A text as character numbers.

    Attributes:
        name: What tables call it.
        sha256: Of the text's bytes.
        num_bytes: Of the text.
        alphabet: Its characters, rarest ones as one; a number indexes it.
        ids: uint8[n].
    """

    name: str
    sha256: str
    num_bytes: int
    alphabet: str
    ids: np.ndarray


def corpus_of(name: str, text: bytes) -> Corpus:
    """`text` with its bytes numbered, the most common first; rare ones share the last number."""
    values = np.frombuffer(text, np.uint8)
    counts = np.bincount(values, minlength=256)
    order = np.argsort(-counts, kind="stable")
    common = order[: min(MAX_CHARACTERS - 1, int((counts > 0).sum()))]
    number_of = np.full(256, len(common), np.uint8)
    number_of[common] = np.arange(len(common), dtype=np.uint8)
    alphabet = "".join(map(chr, common)) + "\ufffd"
    return Corpus(name, hashlib.sha256(text).hexdigest(), len(text), alphabet, number_of[values])


def read_corpus(path: Path) -> Corpus:
    """The text in a file."""
    return corpus_of(path.stem, path.read_bytes())
