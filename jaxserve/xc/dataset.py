"""XcDataset: a prepared data set of extreme classification, memory-mapped.

DIR/
    dataset.json       what it was made of, counts, SHA-256 of every file; ends in its own digest
    tokenizer/         tokenizer.json, tokenizer_config.json
    labels.txt         a label's text a line
    label_tokens.npy   [L, T] token ids without special ones, padded with zeros
    label_lengths.npy  int32[L]
    train/, validation/, test/
        texts.txt, tokens.npy, lengths.npy    the same of the points
        starts.npy, label_ids.npy             their labels, see `LabelSets`
        excluded.npy                          int32[n, 2], pairs to leave out of rankings
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from jaxserve.xc.errors import XcDataError
from jaxserve.xc.label_sets import LabelSets
from jaxserve.xc.raw_data import RawData
from models.tokenizer import Tokenizer

FORMAT = "jaxserve-extreme-classification"
VERSION = 1
MANIFEST = "dataset.json"
TEXT_FILE = "texts.txt"
LABEL_FILE = "labels.txt"

Int32Array = npt.NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a data set comes from.

    Attributes:
        name: of the data set.
        package: registry, package and version, or the folder that it was read from.
        sha256: of the package's archive; None for a folder.
        licence: a note for whoever passes it on.
    """

    name: str
    package: str
    sha256: str | None
    licence: str


@dataclass(frozen=True)
class Texts:
    """Tokenised texts.

    Attributes:
        tokens: ids without special tokens, unsigned [n, T], padded with zeros.
        lengths: int32[n].
    """

    tokens: npt.NDArray[Any]
    lengths: Int32Array

    def __len__(self) -> int:
        return len(self.lengths)


@dataclass(frozen=True)
class XcSplit:
    """Points of one split, with their labels; see `RawSplit`."""

    texts: Texts
    labels: LabelSets
    excluded: Int32Array


class XcDataset:
    """A prepared data set. Opening checks the manifest's digest and that all files have their size.

    Args:
        folder: what `jaxserve data xc` wrote.

    Attributes:
        manifest: the content of dataset.json.
        fingerprint: SHA-256, hex, of all that decides what it holds.
        max_tokens: T, most tokens of a text.
        num_labels: L.

    Raises:
        XcDataError: no data set, damaged or cut short.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = _read_manifest(self.folder)
        for name, entry in self.manifest["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != entry["num_bytes"]:
                raise XcDataError(f"{path} is missing or has another size: prepare the data anew")
        self.fingerprint: str = self.manifest["sha256"]
        self.max_tokens: int = self.manifest["max_tokens"]
        self.num_labels: int = self.manifest["num_labels"]
        self.vocab_size: int = self.manifest["vocab_size"]

    @property
    def tokenizer_folder(self) -> Path:
        """What `Tokenizer.from_folder` takes."""
        return self.folder / "tokenizer"

    def label_texts(self) -> list[str]:
        """One a label."""
        return _read_lines(self.folder / LABEL_FILE)

    def labels(self) -> Texts:
        """The labels' texts, tokenised."""
        return Texts(self._map("label_tokens.npy"), self._map("label_lengths.npy"))

    def split(self, name: str) -> XcSplit:
        """One of `SPLITS`."""
        texts = Texts(self._map(f"{name}/tokens.npy"), self._map(f"{name}/lengths.npy"))
        starts, label_ids = self._map(f"{name}/starts.npy"), self._map(f"{name}/label_ids.npy")
        labels = LabelSets(np.asarray(starts), np.asarray(label_ids), self.num_labels)
        return XcSplit(texts, labels, np.asarray(self._map(f"{name}/excluded.npy")))

    def texts(self, split: str) -> list[str]:
        """The points' texts."""
        return _read_lines(self.folder / split / TEXT_FILE)

    def verify(self) -> None:
        """Reads everything. Raises XcDataError that names a damaged file."""
        for name, entry in self.manifest["files"].items():
            if _sha256(self.folder / name) != entry["sha256"]:
                raise XcDataError(f"{self.folder / name} is damaged: prepare the data anew")

    def _map(self, name: str) -> npt.NDArray[Any]:
        try:
            array: npt.NDArray[Any] = np.load(self.folder / name, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise XcDataError(f"{self.folder / name} cannot be read: {error}") from None
        return array


def write_dataset(
    out: Path,
    data: RawData,
    origin: Origin,
    tokenizer: Tokenizer,
    max_tokens: int,
    *,
    force: bool = False,
) -> XcDataset:
    """Writes a data set; it appears whole or not at all.

    Args:
        out: the folder to make.
        data: what is in it.
        origin: where that is from.
        tokenizer: kept beside it.
        max_tokens: longer texts are cut.
        force: replace `out`.

    Raises:
        XcDataError: `out` is there, or there are no training points.
    """
    if out.exists() and not force:
        raise XcDataError(f"{out} is there already: give another --out, or replace it with --force")
    if not data.splits["train"].texts:
        raise XcDataError(f"{origin.name} has no training points with labels")
    staging = out.with_name(f".{out.name}.preparing")
    shutil.rmtree(staging, ignore_errors=True)
    (staging / "tokenizer").mkdir(parents=True)
    _write_tokenizer(staging / "tokenizer", tokenizer)
    _write_texts(staging, LABEL_FILE, "label_", data.label_texts, tokenizer, max_tokens)
    for name, split in data.splits.items():
        (staging / name).mkdir()
        _write_texts(staging / name, TEXT_FILE, "", split.texts, tokenizer, max_tokens)
        arrays: dict[str, npt.NDArray[Any]] = {
            "starts": split.labels.starts,
            "label_ids": split.labels.label_ids,
            "excluded": split.excluded,
        }
        for key, array in arrays.items():
            np.save(staging / name / f"{key}.npy", array, allow_pickle=False)
    _write_manifest(staging, data, origin, tokenizer, max_tokens)
    if out.exists():
        shutil.rmtree(out)
    staging.replace(out)
    return XcDataset(out)


def tokenise(tokenizer: Tokenizer, texts: Sequence[str], max_tokens: int) -> Texts:
    """Texts as ids without special tokens. Those that are empty get one token, id 0."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    tokens = np.zeros((len(texts), max_tokens), dtype)
    lengths = np.ones(len(texts), np.int32)
    for first in range(0, len(texts), 4096):
        encoded = tokenizer.backend.encode_batch(
            list(texts[first : first + 4096]), add_special_tokens=False
        )
        for row, one in enumerate(encoded, first):
            ids = one.ids[:max_tokens]
            tokens[row, : len(ids)] = ids
            lengths[row] = max(1, len(ids))
    return Texts(tokens, lengths)


def _write_texts(
    folder: Path,
    text_file: str,
    prefix: str,
    texts: list[str],
    tokenizer: Tokenizer,
    max_tokens: int,
) -> None:
    plain = [" ".join(text.split()) for text in texts]
    (folder / text_file).write_text("".join(f"{text}\n" for text in plain), encoding="utf-8")
    tokenised = tokenise(tokenizer, plain, max_tokens)
    np.save(folder / f"{prefix}tokens.npy", tokenised.tokens, allow_pickle=False)
    np.save(folder / f"{prefix}lengths.npy", tokenised.lengths, allow_pickle=False)


def _write_tokenizer(folder: Path, tokenizer: Tokenizer) -> None:
    (folder / "tokenizer.json").write_text(tokenizer.backend.to_str(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text("{}\n")


def _write_manifest(
    folder: Path, data: RawData, origin: Origin, tokenizer: Tokenizer, max_tokens: int
) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    fields: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "origin": asdict(origin),
        "max_tokens": max_tokens,
        "vocab_size": tokenizer.vocab_size,
        "num_labels": len(data.label_texts),
        "num_points": {name: len(split.texts) for name, split in data.splits.items()},
        "counts": data.counts,
        "files": {
            path.relative_to(folder).as_posix(): {
                "num_bytes": path.stat().st_size,
                "sha256": _sha256(path),
            }
            for path in paths
        },
    }
    fields["sha256"] = _digest_of(fields)
    (folder / MANIFEST).write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    try:
        fields: Any = json.loads(path.read_text())
    except FileNotFoundError:
        raise XcDataError(f"{folder} holds no data set: make one with `jaxserve data xc`") from None
    except (OSError, ValueError) as error:
        raise XcDataError(f"{path} is damaged: {error}") from None
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise XcDataError(
            f"{folder} holds no data set of extreme classification: `jaxserve data xc` makes one"
        )
    if fields.get("version") != VERSION:
        raise XcDataError(f"{path} has version {fields.get('version')}; this one reads {VERSION}")
    if fields.pop("sha256", None) != (digest := _digest_of(fields)):
        raise XcDataError(f"{path} is damaged: prepare the data anew")
    return {**fields, "sha256": digest}


def _digest_of(fields: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _read_lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
