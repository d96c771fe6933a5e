"""LabelSets: which labels each point has, as one sparse array."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64Array = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class LabelSets:
    """The labels of N points, in the layout of a CSR matrix of ones.

    Attributes:
        starts: int64[N + 1]; the labels of point i are `label_ids[starts[i] : starts[i + 1]]`.
        label_ids: int32[total], ascending within a point, each at most once.
        num_labels: ids are 0 .. num_labels - 1.
    """

    starts: Int64Array
    label_ids: Int32Array
    num_labels: int

    @classmethod
    def of(cls, sets: Iterable[Iterable[int]], num_labels: int) -> LabelSets:
        """From the labels of each point, in any order.

        Raises:
            ValueError: an id outside 0 .. num_labels - 1.
        """
        rows = [sorted(set(one)) for one in sets]
        sizes = np.array([len(row) for row in rows], np.int64)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        label_ids = np.array([label for row in rows for label in row], np.int32)
        if len(label_ids) and not 0 <= label_ids.min() <= label_ids.max() < num_labels:
            raise ValueError(f"label ids must be 0 to {num_labels - 1}")
        return cls(starts, label_ids, num_labels)

    @property
    def num_points(self) -> int:
        """N."""
        return len(self.starts) - 1

    def __getitem__(self, point: int) -> Int32Array:
        """The labels of one point, ascending."""
        return self.label_ids[self.starts[point] : self.starts[point + 1]]

    def sizes(self) -> Int64Array:
        """Labels of each point, int64[N]."""
        return np.diff(self.starts)

    def label_counts(self) -> Int64Array:
        """Points of each label, int64[num_labels]."""
        return np.bincount(self.label_ids, minlength=self.num_labels).astype(np.int64)

    def take(self, points: Sequence[int] | Int64Array) -> LabelSets:
        """The sets of `points`, in their order; a point may come twice."""
        points = np.asarray(points, np.int64)
        sizes = self.sizes()[points]
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
        offsets = np.arange(int(starts[-1])) - np.repeat(starts[:-1], sizes)
        places = np.repeat(self.starts[points], sizes) + offsets
        return LabelSets(starts, self.label_ids[places], self.num_labels)

    def contains(self, points: Int64Array, labels: Int32Array) -> BoolArray:
        """Whether `points[i]` has `labels[j]`: bool[len(points), len(labels)].

        Works on the pairs that there are, not on all pairs: labels may come several times.
        """
        own = self.take(points)
        order = np.argsort(labels, kind="stable")
        ascending = labels[order]
        first = np.searchsorted(ascending, own.label_ids, "left")
        last = np.searchsorted(ascending, own.label_ids, "right")
        counts = last - first
        rows = np.repeat(np.repeat(np.arange(len(points)), own.sizes()), counts)
        before = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])[:-1]
        within = np.arange(int(counts.sum())) - np.repeat(before, counts)
        found = np.zeros((len(points), len(labels)), np.bool_)
        found[rows, order[np.repeat(first, counts) + within]] = True
        return found

    def hits(self, predicted: npt.NDArray[np.integer]) -> BoolArray:
        """Whether each predicted label is one of its point's: bool[N, k].

        Args:
            predicted: int[N, k]; a negative id stands for no prediction.
        """
        points = np.repeat(np.arange(self.num_points), self.sizes())
        own = points * np.int64(self.num_labels) + self.label_ids
        asked = np.arange(self.num_points)[:, None] * np.int64(self.num_labels) + predicted
        return np.isin(asked, own) & (predicted >= 0)


def is_repeat(labels: Int32Array) -> BoolArray:
    """Whether a label stands further in front already: bool[n]."""
    repeats = np.ones(len(labels), np.bool_)
    repeats[np.unique(labels, return_index=True)[1]] = False
    return repeats
