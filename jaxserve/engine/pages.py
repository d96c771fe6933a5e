"""The KV pool's pages: who holds which, and which can be found again by content.

A page is in exactly one state:

- *held*: one or more sequences have it in their tables (its reference count);
- *cached*: nobody holds it, but its content is registered and may be reused;
- *free*: nobody holds it and its content means nothing.

Only full pages whose token ids are known may be registered, from the moment on that the
step which fills them is planned. A page that is full is never written again until it
was evicted, so sequences with one prompt share its full pages without a copy.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from jaxserve.engine.cached_pages import CachedPages


def root_key(salt: str) -> bytes:
    """Start of the key chain of every sequence with this cache salt."""
    return hashlib.blake2b(salt.encode(), digest_size=32, person=b"prefix root").digest()


def page_key(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Key of a full page: its own tokens and, by `parent`, all before them."""
    return hashlib.blake2b(parent + array("I", token_ids).tobytes(), digest_size=32).digest()


class PageIntegrityError(RuntimeError):
    """The pool's books do not balance: a defect of the engine."""


class PagePool:
    """A fixed number of pages with reference counts and a prefix cache.

    Not thread-safe; owned by the scheduler. Token ids are below 2**32.

    Args:
        num_pages: pages in the pool; ids are 0 .. num_pages - 1.
        page_size: tokens that a page holds.
        prefix_caching: False makes `register` and `find_prefix` do nothing.
    """

    def __init__(self, num_pages: int, page_size: int, *, prefix_caching: bool = True) -> None:
        self.num_total = num_pages
        self.page_size = page_size
        self.prefix_caching = prefix_caching
        self.track_freed = False
        """Collect ids for `drain_freed`, so that tests can poison the pages."""
        self._free = list(range(num_pages - 1, -1, -1))
        self._num_holders = [0] * num_pages
        self._cached = CachedPages()
        self._salt_of_page = [""] * num_pages
        self._owner_of_page = [""] * num_pages
        self._key_of_page: list[bytes | None] = [None] * num_pages
        self._tokens_of_page: list[tuple[int, ...]] = [()] * num_pages
        self._page_of_key: dict[bytes, int] = {}
        self._freed: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    @property
    def num_held(self) -> int:
        return self.num_total - len(self._free) - len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages that `allocate` can give: free ones and cached ones in no reserve."""
        return len(self._free) + len(self._cached) - self._cached.num_reserved

    def reserve(self, shares: Mapping[str, float]) -> None:
        """From now on each owner keeps its part of the pool, between 0 and 1, against all others.

        May be called from any thread. The parts must leave room for the longest sequence.
        """
        self._cached.reserves = {
            owner: int(share * self.num_total) for owner, share in shares.items()
        }

    def allocate(self, num_pages: int) -> list[int]:
        """Takes pages, free ones first, then the least recently used cached ones.

        The caller has checked `num_available`; too few is its defect and
        raises PageIntegrityError without taking any. Reserves that were made
        since give way.
        """
        num_available = len(self._free) + len(self._cached)
        if num_pages > num_available:
            raise PageIntegrityError(
                f"{num_pages} pages were asked for, {num_available} are available"
            )
        page_ids = []
        for _ in range(num_pages):
            page_id = self._free.pop() if self._free else self._evict()
            self._num_holders[page_id] = 1
            page_ids.append(page_id)
        return page_ids

    def share(self, page_ids: Iterable[int]) -> None:
        """Adds a holder to registered pages that `find_prefix` returned."""
        for page_id in page_ids:
            if self._num_holders[page_id] == 0:
                self._cached.remove(page_id)
            self._num_holders[page_id] += 1

    def release(self, page_ids: Sequence[int]) -> None:
        """Takes one holder off each page of a table: the only way back.

        The table's last pages become the first to be evicted, since a prefix
        is of use without its tail but not the other way round.
        """
        for page_id in reversed(page_ids):
            holders = self._num_holders[page_id] - 1
            if holders < 0:
                raise PageIntegrityError(f"page {page_id} was released twice")
            self._num_holders[page_id] = holders
            if holders:
                continue
            if self._key_of_page[page_id] is not None:
                self._cached.add(page_id, self._owner_of_page[page_id])
            else:
                self._free.append(page_id)
                self._note_freed(page_id)

    def register(
        self,
        page_id: int,
        key: bytes,
        token_ids: tuple[int, ...],
        *,
        salt: str = "",
        owner: str = "",
    ) -> None:
        """Makes a held, full page findable by `key`. The first page of a key stays.

        Args:
            salt: of the key's chain.
            owner: whose part of the cache it fills once nobody holds it.
        """
        if not self.prefix_caching or key in self._page_of_key:
            return
        self._page_of_key[key] = page_id
        self._key_of_page[page_id] = key
        self._tokens_of_page[page_id] = token_ids
        self._salt_of_page[page_id] = salt
        self._owner_of_page[page_id] = owner

    def withdraw(self, page_ids: Iterable[int]) -> None:
        """Makes registered pages unfindable; those who hold them keep them."""
        for page_id in page_ids:
            key = self._key_of_page[page_id]
            if key is not None and self._page_of_key.get(key) == page_id:
                del self._page_of_key[key]

    def find_prefix(
        self, keys: Sequence[bytes], token_ids: Sequence[int], *, salt: str = ""
    ) -> list[int]:
        """Pages that hold the longest registered prefix; takes no reference.

        Args:
            keys: key chain of the leading full pages.
            token_ids, salt: the tokens of these pages, and the chain's salt; compared, so
                that a key collision can't join two prompts or two tenants.
        """
        size = self.page_size
        page_ids: list[int] = []
        for index, key in enumerate(keys):
            page_id = self._page_of_key.get(key)
            if page_id is None or self._salt_of_page[page_id] != salt:
                break
            if self._tokens_of_page[page_id] != tuple(token_ids[index * size : (index + 1) * size]):
                break
            page_ids.append(page_id)
        return page_ids

    def forget(self) -> None:
        """Empties the prefix cache: what its pages hold no longer means anything.

        Raises PageIntegrityError if a sequence holds a page: only its owner can let go of it.
        """
        if self.num_held:
            raise PageIntegrityError(f"{self.num_held} pages are held")
        while self._cached:
            self._free.append(self._evict())

    def num_unheld(self, page_ids: Iterable[int]) -> int:
        """How much sharing the pages takes from `num_available`: those that nobody holds, but
        for the ones in a reserve."""
        return self._cached.num_evictable(p for p in page_ids if self._num_holders[p] == 0)

    def drain_freed(self) -> list[int]:
        """Pages whose content became meaningless since the last call.

        Empty unless `track_freed`. A page may have been given out again since,
        but no step that was planned before this call reads or writes it.
        """
        freed, self._freed = self._freed, []
        return freed

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Raises PageIntegrityError unless the books match `tables`.

        `tables` are the page tables of all sequences that hold pages. Costs
        O(pages): for tests and idle moments.
        """
        holders = Counter(page_id for table in tables for page_id in table)
        free, cached = set(self._free), set(self._cached)
        problems = []
        if len(free) != len(self._free) or free & cached:
            problems.append("a page is listed twice as free or cached")
        if len(free) + len(cached) + len(holders) != self.num_total:
            problems.append(
                f"free {len(free)} + cached {len(cached)} + held {len(holders)} "
                f"!= total {self.num_total}"
            )
        for page_id, count in enumerate(self._num_holders):
            registered = self._key_of_page[page_id] is not None
            if count != holders.get(page_id, 0):
                problems.append(f"page {page_id} counts {count} holders, not {holders[page_id]}")
            if count > 1 and not registered:
                problems.append(f"page {page_id} is shared but not registered")
            if (count == 0) != (page_id in free or page_id in cached):
                problems.append(f"page {page_id} has {count} holders but the wrong state")
            if (page_id in cached and not registered) or (page_id in free and registered):
                problems.append(f"page {page_id} is registered: {registered}, against its state")
        if any(self._key_of_page[page] != key for key, page in self._page_of_key.items()):
            problems.append("a key leads to a page with another key")
        if problems:
            raise PageIntegrityError("; ".join(problems[:5]))

    def _evict(self) -> int:
        page_id = self._cached.pop_oldest()
        self.withdraw([page_id])
        self._key_of_page[page_id] = None
        self._tokens_of_page[page_id] = ()
        self._salt_of_page[page_id] = self._owner_of_page[page_id] = ""
        self._note_freed(page_id)
        return page_id

    def _note_freed(self, page_id: int) -> None:
        if self.track_freed:
            self._freed.append(page_id)
