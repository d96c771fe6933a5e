"""Sparse label sets against plain sets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.xc.label_sets import LabelSets, is_repeat

SETS = st.lists(st.sets(st.integers(0, 7), max_size=4), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(sets=SETS, data=st.data())
def test_contains_and_hits_say_what_sets_say(sets: list[set[int]], data: st.DataObject) -> None:
    held = LabelSets.of(sets, 8)
    points = np.array(data.draw(st.lists(st.integers(0, len(sets) - 1), min_size=1, max_size=5)))
    labels = np.array(data.draw(st.lists(st.integers(-1, 7), max_size=8)), np.int32)
    expected = [[int(label) in sets[point] for label in labels] for point in points]
    assert (
        held.contains(points, labels).tolist() == np.reshape(expected, (len(points), -1)).tolist()
    )
    taken = held.take(points)
    assert [set(taken[place].tolist()) for place in range(len(points))] == [sets[p] for p in points]
    predicted = np.array([data.draw(st.permutations(range(-1, 8))) for _ in sets])
    hits = [[one in own for one in row] for own, row in zip(sets, predicted.tolist(), strict=True)]
    assert held.hits(predicted).tolist() == hits
    assert held.label_counts().sum() == held.sizes().sum() == sum(map(len, sets))


def test_an_unknown_label_is_refused() -> None:
    with pytest.raises(ValueError, match="0 to 2"):
        LabelSets.of([[3]], 3)


def test_repeats_are_all_but_the_first() -> None:
    assert is_repeat(np.array([3, 1, 3, -1, 1, 3, -1], np.int32)).tolist() == [
        False, False, True, False, True, True, True,
    ]  # fmt: skip
