"""IndexSampler: a permutation an epoch, however it is asked."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.trainer.data.sampler import IndexSampler

sizes = st.integers(1, 3000)
seeds = st.integers(0, 2**63 - 1)


@settings(deadline=None, max_examples=50)
@given(sizes, seeds, st.integers(0, 10**6))
def test_every_epoch_is_a_permutation(num_examples: int, seed: int, epoch: int) -> None:
    ids = IndexSampler(num_examples, seed).ids_of(epoch * num_examples, num_examples)
    assert sorted(ids.tolist()) == list(range(num_examples))


@settings(deadline=None, max_examples=50)
@given(sizes, seeds, st.lists(st.integers(0, 60), min_size=1, max_size=6), st.integers(0, 9000))
def test_slicing_changes_nothing(num_examples: int, seed: int, cuts: list[int], first: int) -> None:
    sampler = IndexSampler(num_examples, seed)
    whole = sampler.ids_of(first, sum(cuts))
    parts, index = [], first
    for count in cuts:
        parts.append(sampler.ids_of(index, count))
        index += count
    assert np.array_equal(np.concatenate(parts), whole)


@settings(deadline=None, max_examples=50)
@given(st.integers(100, 3000), seeds)
def test_epochs_and_seeds_differ(num_examples: int, seed: int) -> None:
    sampler = IndexSampler(num_examples, seed)
    first, second = sampler.ids_of(0, num_examples), sampler.ids_of(num_examples, num_examples)
    other = IndexSampler(num_examples, (seed + 1) % 2**63).ids_of(0, num_examples)
    # Two random permutations share one place on average.
    assert (first == second).sum() < 12
    assert (first == other).sum() < 12
    assert (first == np.arange(num_examples)).sum() < 12


def test_the_order_never_changes() -> None:
    """Runs that are resumed with a later version must see the same order."""
    ids = IndexSampler(1000, 7).ids_of(998, 6)
    assert ids.tolist() == [339, 425, 363, 45, 246, 899]


def test_places_of_an_id_are_spread() -> None:
    """Over epochs, an example turns up in every quarter of the epoch about equally often."""
    sampler = IndexSampler(1000, 3)
    places = [int(np.flatnonzero(sampler.ids_of(e * 1000, 1000) == 17)[0]) for e in range(400)]
    quarters = np.bincount(np.array(places) // 250, minlength=4)
    assert quarters.min() > 70  # 100 expected, standard deviation 8.7


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 500), seeds, st.data())
def test_quarantine_moves_nobody_else(num_examples: int, seed: int, data: st.DataObject) -> None:
    bad = data.draw(
        st.frozensets(st.integers(0, num_examples - 1), max_size=num_examples // 2), "bad"
    )
    plain = IndexSampler(num_examples, seed).ids_of(0, 2 * num_examples)
    ids = IndexSampler(num_examples, seed, bad).ids_of(0, 2 * num_examples)
    is_bad = np.isin(plain, sorted(bad))
    assert np.array_equal(ids[~is_bad], plain[~is_bad])
    assert not bad & set(ids.tolist())
    assert ids.min() >= 0
    assert ids.max() < num_examples


@settings(deadline=None, max_examples=50)
@given(st.integers(4, 500), seeds, st.data())
def test_later_quarantine_keeps_earlier_substitutes(
    num_examples: int, seed: int, data: st.DataObject
) -> None:
    ids = st.integers(0, num_examples - 1)
    some = data.draw(st.frozensets(ids, max_size=num_examples // 4), "some")
    more = some | data.draw(st.frozensets(ids, max_size=num_examples // 4), "more")
    before = IndexSampler(num_examples, seed, some).ids_of(5, num_examples)
    after = IndexSampler(num_examples, seed, more).ids_of(5, num_examples)
    is_kept = ~np.isin(before, sorted(more))
    assert np.array_equal(before[is_kept], after[is_kept])


def test_substitutes_do_not_depend_on_slicing() -> None:
    sampler = IndexSampler(50, 1, range(20))
    whole = sampler.ids_of(0, 120)
    assert [int(sampler.ids_of(index, 1)[0]) for index in range(120)] == whole.tolist()


def test_large_sizes() -> None:
    ids = IndexSampler(10**12, 5).ids_of(10**12 - 1000, 2000)
    assert ids.min() >= 0
    assert ids.max() < 10**12
    assert len(set(ids.tolist())) == 2000


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1), "num_examples"),
        ((5, -1), "seed"),
        ((5, 2**63), "seed"),
        ((5, 1, [5]), "from 0 to 4"),
        ((5, 1, [0, 1, 2]), "more than half"),
    ],
)
def test_wrong_arguments_are_refused(arguments: tuple[object, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        IndexSampler(*arguments)  # type: ignore[arg-type]


def test_negative_index_is_refused() -> None:
    with pytest.raises(ValueError, match="must not be negative"):
        IndexSampler(5, 1).ids_of(-1, 2)
