"""The files of a prepared data set, and its manifest.

    DIR/
        dataset.json      manifest: what it is made of, sizes and digests; ends in its own digest
        tokenizer/        tokenizer.json, tokenizer_config.json
        train/, eval/     one folder a split:
            tokens.bin        token ids of all documents, one after the other: uint16 or uint32
            weights.bin       chat only: uint8 a token, 1 where it is to be learnt
            documents.bin     where each document starts in tokens.bin: int64, ascending
            rows.bin          ROW records: the examples

All numbers are little-endian. A row is a run of at most T + 1 tokens; its first T are the
inputs, its last T the targets. The same sources, tokenizer and options give the same bytes
on any machine, with any number of workers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxserve.trainer.data.errors import DataError

FORMAT = "jaxserve-tokens"
VERSION = 1
MANIFEST_NAME = "dataset.json"
SPLITS = ("train", "eval")
MAX_MANIFEST_BYTES = 64 << 20

ROW = np.dtype([("start", "<i8"), ("num_tokens", "<i4"), ("num_targets", "<i4")])
"""One example: its first token in tokens.bin, how many it has, how many targets count."""
DOCUMENT_START = np.dtype("<i8")
WEIGHT = np.dtype("u1")


@dataclass(frozen=True, slots=True)
class FileDigest:
    """Size and SHA-256 of one file."""

    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class SplitManifest:
    """What one split holds."""

    num_examples: int
    num_documents: int
    num_tokens: int
    num_targets: int
    files: Mapping[str, FileDigest]


@dataclass(frozen=True, slots=True)
class Manifest:
    """The content of dataset.json."""

    kind: str
    """"text" or "chat"."""
    seq_len: int
    vocab_size: int
    token_dtype: str
    """"uint16" or "uint32"."""
    tokenizer_sha256: str
    options: Mapping[str, Any]
    """What else the bytes depend on, e.g. the field's name and the split's fraction."""
    sources: tuple[Mapping[str, Any], ...]
    """Name, size and SHA-256 of each source file, in reading order."""
    counts: Mapping[str, int]
    """What was dropped or cut while preparing, by reason."""
    splits: Mapping[str, SplitManifest]

    @property
    def token_type(self) -> np.dtype[Any]:
        return np.dtype(self.token_dtype).newbyteorder("<")

    def fingerprint(self, split: str) -> str:
        """SHA-256 of all that decides what `read` returns for the ids of `split`."""
        files = {name: digest.sha256 for name, digest in self.splits[split].files.items()}
        content = [FORMAT, VERSION, self.kind, self.seq_len, self.tokenizer_sha256, files]
        return hashlib.sha256(_canonical(content)).hexdigest()

    def to_bytes(self) -> bytes:
        """dataset.json: indented for people, with a digest over the compact form."""
        fields = {"format": FORMAT, "version": VERSION, **asdict(self)}
        digest = hashlib.sha256(_canonical(fields)).hexdigest()
        return json.dumps({**fields, "sha256": digest}, indent=1, sort_keys=True).encode() + b"\n"


def read_manifest(folder: Path) -> Manifest:
    """The verified manifest of a prepared data set.

    Raises DataError: none there, another format, or its digest is wrong.
    """
    path = folder / MANIFEST_NAME
    remedy = "prepare it anew with `jaxserve data prepare`"
    if not path.is_file():
        raise DataError(
            f"{folder} is no prepared data set: it has no {MANIFEST_NAME}; make one with "
            "`jaxserve data prepare SOURCE... --out DIR --tokenizer MODEL`"
        )
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise DataError(f"{path} is larger than {MAX_MANIFEST_BYTES} bytes; {remedy}")
        fields = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON: {error}; {remedy}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise DataError(f"{path} is not the manifest of a prepared data set; {remedy}")
    if fields.get("version") != VERSION:
        raise DataError(f"{path} has version {fields.get('version')}, not {VERSION}; {remedy}")
    digest = fields.pop("sha256", None)
    if digest != hashlib.sha256(_canonical(fields)).hexdigest():
        raise DataError(f"{path} is damaged: its digest is wrong; {remedy}")
    return _from_fields(fields)


def _from_fields(fields: dict[str, Any]) -> Manifest:
    """`fields` carry a valid digest, so they are as `Manifest.to_bytes` wrote them."""
    splits = {
        name: _split_from_fields(fields["splits"][name])
        for name in SPLITS
        if name in fields["splits"]
    }
    known = {key: value for key, value in fields.items() if key not in ("format", "version")}
    return Manifest(**{**known, "splits": splits, "sources": tuple(fields["sources"])})


def _split_from_fields(fields: dict[str, Any]) -> SplitManifest:
    files = {name: FileDigest(**digest) for name, digest in fields["files"].items()}
    return SplitManifest(**{**fields, "files": files})


def _canonical(value: Any) -> bytes:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")
