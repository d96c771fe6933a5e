"""RawData: texts and labels before they are tokenised, and how they are split."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from jaxserve.xc.errors import XcDataError
from jaxserve.xc.label_sets import LabelSets
from jaxserve.xc.xc_format import read_label_matrix, read_pairs, read_records, read_texts

SPLITS = ("train", "validation", "test")
VALIDATION_SHARE = 0.08
TEST_SHARE = 0.20


@dataclass(frozen=True)
class RawSplit:
    """Points of one split.

    Attributes:
        texts: one a point, without line breaks.
        labels: of the points.
        excluded: int32[n, 2], pairs (point, label) that a ranking must leave out, such as a
            product and itself.
    """

    texts: list[str]
    labels: LabelSets
    excluded: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty((0, 2), np.int32))


@dataclass(frozen=True)
class RawData:
    """A data set.

    Attributes:
        label_texts: one a label.
        splits: by name, see `SPLITS`; every label has a point in `train`.
        counts: what was left out, by reason.
    """

    label_texts: list[str]
    splits: dict[str, RawSplit]
    counts: dict[str, int]


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a source: `key` decides its split, and labels are named by any texts."""

    key: str
    text: str
    labels: tuple[str, ...]


def split_of(key: str) -> str:
    """The split of a point: 72 % train, 8 % validation, 20 % test, by SHA-256 of its key."""
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2.0**64
    if number < TEST_SHARE:
        return "test"
    return "validation" if number < TEST_SHARE + VALIDATION_SHARE else "train"


def split_points(points: Sequence[Point], label_texts: dict[str, str]) -> RawData:
    """Splits points by their keys, and numbers the labels that training has, in order of name.

    Labels without a point in training are dropped, and then points without labels.
    """
    by_split: dict[str, list[Point]] = {name: [] for name in SPLITS}
    for point in points:
        by_split[split_of(point.key)].append(point)
    names = sorted({label for point in by_split["train"] for label in point.labels})
    ids = {name: number for number, name in enumerate(names)}
    splits, num_dropped = {}, 0
    for name, members in by_split.items():
        known = [[ids[one] for one in point.labels if one in ids] for point in members]
        kept = [number for number, labels in enumerate(known) if labels]
        num_dropped += len(members) - len(kept)
        splits[name] = RawSplit(
            [members[number].text for number in kept],
            LabelSets.of((known[number] for number in kept), len(names)),
        )
    counts = {
        "labels without a training point": len(label_texts) - len(names),
        "points without a label that training has": num_dropped,
    }
    return RawData([label_texts[name] for name in names], splits, counts)


def read_repository_folder(folder: Path) -> RawData:
    """A data set of the Extreme Classification Repository, as it is unpacked.

    Either `trn.json.gz`, `tst.json.gz` and `lbl.json.gz`, or `trn_X_Y.txt`, `tst_X_Y.txt` with
    `raw_data/train.raw.txt`, `test.raw.txt` and `label.raw.txt`. `filter_labels_test.txt` is
    used if it is there. A tenth of the training points, chosen by a hash of their place, become
    the validation split.

    Raises:
        XcDataError: names what is missing or wrong.
    """
    if (folder / "lbl.json.gz").is_file():
        label_texts = [record.text for record in read_records(folder / "lbl.json.gz")]
        train, test = (
            _json_split(folder / name, len(label_texts)) for name in ("trn.json.gz", "tst.json.gz")
        )
    elif (folder / "trn_X_Y.txt").is_file():
        label_texts = read_texts(folder / "raw_data" / "label.raw.txt")
        train, test = (
            _sparse_split(folder / f"{short}_X_Y.txt", folder / "raw_data" / f"{name}.raw.txt")
            for short, name in (("trn", "train"), ("tst", "test"))
        )
    else:
        raise XcDataError(
            f"{folder} has neither lbl.json.gz nor trn_X_Y.txt: give the unpacked folder of a data "
            "set of the Extreme Classification Repository that has label features (LF-...)"
        )
    for split in (train, test):
        if split.labels.num_labels != len(label_texts):
            raise XcDataError(
                f"{folder}: {len(label_texts)} labels have texts, but points have "
                f"{split.labels.num_labels}"
            )
    filter_path = folder / "filter_labels_test.txt"
    if filter_path.is_file():
        test = RawSplit(test.texts, test.labels, read_pairs(filter_path))
    return _with_validation(label_texts, train, test)


def _json_split(path: Path, num_labels: int) -> RawSplit:
    records = list(read_records(path))
    try:
        labels = LabelSets.of((record.label_ids for record in records), num_labels)
    except ValueError as error:
        raise XcDataError(f"{path}: {error}, as lbl.json.gz has lines") from None
    return RawSplit([record.text for record in records], labels)


def _sparse_split(labels: Path, texts: Path) -> RawSplit:
    split = RawSplit(read_texts(texts), read_label_matrix(labels))
    if len(split.texts) != split.labels.num_points:
        raise XcDataError(
            f"{texts} has {len(split.texts)} lines, but {labels} has {split.labels.num_points} rows"
        )
    return split


def _with_validation(label_texts: list[str], train: RawSplit, test: RawSplit) -> RawData:
    keys = [hashlib.sha256(b"%d" % place).digest()[0] for place in range(len(train.texts))]
    has_labels = train.labels.sizes() > 0
    is_held = (np.array(keys) < 26) & has_labels
    parts = {"train": ~is_held & has_labels, "validation": is_held}
    splits = {
        name: RawSplit(
            [train.texts[place] for place in np.flatnonzero(mask)],
            train.labels.take(np.flatnonzero(mask)),
        )
        for name, mask in parts.items()
    }
    counts = {"training points without a label": int((~has_labels).sum())}
    return RawData(label_texts, {**splits, "test": test}, counts)
