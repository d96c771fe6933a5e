"""PagePool: states of a page, sharing, eviction, and books that always balance."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jaxserve.engine.pages import PageIntegrityError, PagePool, page_key, root_key


def register_chain(
    pool: PagePool, pages: list[int], token_ids: list[int], salt: str = ""
) -> list[bytes]:
    size, key, keys = pool.page_size, root_key(salt), []
    for index, page in enumerate(pages):
        tokens = tuple(token_ids[index * size : (index + 1) * size])
        key = page_key(key, tokens)
        keys.append(key)
        pool.register(page, key, tokens)
    return keys


def test_registered_pages_are_found_shared_and_outlive_their_holder() -> None:
    pool = PagePool(4, 2)
    table = pool.allocate(3)
    keys = register_chain(pool, table[:2], [1, 2, 3, 4])
    assert pool.find_prefix(keys, [1, 2, 3, 4]) == table[:2]
    assert pool.num_unheld(table[:2]) == 0
    pool.release(table)
    assert (pool.num_free, pool.num_cached, pool.num_held) == (2, 2, 0)
    found = pool.find_prefix(keys, [1, 2, 3, 4])
    assert pool.num_unheld(found) == 2
    pool.share(found)
    pool.share(found[:1])
    assert (pool.num_free, pool.num_cached, pool.num_held) == (2, 0, 2)
    pool.check_integrity([found, found[:1]])


def test_salts_and_parents_separate_equal_pages() -> None:
    assert page_key(root_key("a"), (1, 2)) != page_key(root_key("b"), (1, 2))
    first = page_key(root_key(""), (1, 2))
    assert page_key(first, (1, 2)) != first
    assert page_key(root_key(""), (1, 2)) == first


def test_a_key_collision_does_not_join_two_prompts() -> None:
    pool = PagePool(2, 2)
    table = pool.allocate(1)
    keys = register_chain(pool, table, [1, 2])
    assert pool.find_prefix(keys, [1, 3]) == []


def test_eviction_takes_the_least_recently_used_and_tails_before_heads() -> None:
    pool = PagePool(4, 1)
    pool.track_freed = True
    first, second = pool.allocate(2), pool.allocate(2)
    keys = register_chain(pool, first, [1, 2]) + register_chain(pool, second, [3, 4])
    pool.release(first)
    pool.release(second)
    assert pool.drain_freed() == []
    assert pool.allocate(2) == [first[1], first[0]]
    assert pool.drain_freed() == [first[1], first[0]]
    assert pool.find_prefix(keys[:2], [1, 2]) == []
    assert pool.allocate(1) == [second[1]]
    assert pool.find_prefix(keys[2:], [3, 4]) == [second[0]]


def test_without_prefix_caching_nothing_is_found_and_released_pages_are_free() -> None:
    pool = PagePool(2, 1, prefix_caching=False)
    table = pool.allocate(2)
    keys = register_chain(pool, table, [1, 2])
    assert pool.find_prefix(keys, [1, 2]) == []
    pool.release(table)
    assert (pool.num_free, pool.num_cached) == (2, 0)


def test_too_many_pages_or_a_double_release_is_a_defect() -> None:
    pool = PagePool(2, 1)
    table = pool.allocate(1)
    with pytest.raises(PageIntegrityError, match="1 are available"):
        pool.allocate(2)
    assert pool.num_free == 1
    pool.release(table)
    with pytest.raises(PageIntegrityError, match="released twice"):
        pool.release(table)


@pytest.mark.parametrize("tables", [[], [[0, 1]], [[0], [0]], [[1]]])
def test_check_integrity_sees_tables_that_do_not_match(tables: list[list[int]]) -> None:
    pool = PagePool(3, 1)
    assert pool.allocate(1) == [0]
    pool.check_integrity([[0]])
    with pytest.raises(PageIntegrityError):
        pool.check_integrity(tables)


class PagePoolMachine(RuleBasedStateMachine):
    """Sequences over two letters, so that prefixes meet often."""

    @initialize(num_pages=st.integers(1, 10), page_size=st.integers(1, 3))
    def start(self, num_pages: int, page_size: int) -> None:
        self.pool = PagePool(num_pages, page_size)
        self.pool.track_freed = True
        self.tables: list[list[int]] = []
        self.content: dict[int, tuple[int, ...]] = {}
        """Page -> the tokens up to its end, as its writer left it."""

    @rule(letters=st.lists(st.integers(0, 1), min_size=1, max_size=4))
    def admit(self, letters: list[int]) -> None:
        size = self.pool.page_size
        token_ids = [letter for letter in letters for _ in range(size)]
        key, keys = root_key(""), []
        for index in range(len(letters)):
            key = page_key(key, token_ids[index * size : (index + 1) * size])
            keys.append(key)
        found = self.pool.find_prefix(keys, token_ids)
        for index, page in enumerate(found):
            assert self.content[page] == tuple(token_ids[: (index + 1) * size])
        missing = len(letters) - len(found)
        if missing + self.pool.num_unheld(found) > self.pool.num_available:
            return
        self.pool.share(found)
        table = found + self.pool.allocate(missing)
        for page in self.pool.drain_freed():
            self.content.pop(page, None)
        for index in range(len(found), len(letters)):
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            self.content[table[index]] = tuple(token_ids[: (index + 1) * size])
            self.pool.register(table[index], keys[index], tokens)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.release(self.tables.pop(index))

    @invariant()
    def books_balance(self) -> None:
        self.pool.check_integrity(self.tables)
        assert self.pool.num_held == len({page for table in self.tables for page in table})
        assert self.pool.num_free + self.pool.num_cached + self.pool.num_held == self.pool.num_total


PagePoolMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=30, deadline=None, derandomize=True
)
test_random_sequences = PagePoolMachine.TestCase
