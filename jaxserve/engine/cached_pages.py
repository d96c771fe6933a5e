"""CachedPages: pages that nobody holds and that can be found again, until they are evicted."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping


class CachedPages:
    """Least recently used first, each in the part of its owner.

    An owner may have a reserve: that many of its pages, the most recently used ones, make room
    for nobody, not for the owner's own new pages either.
    """

    def __init__(self) -> None:
        self._of_owner: dict[str, OrderedDict[int, int]] = {}
        """Pages of each owner that has some, and when each came, as a count."""
        self._owner_of: dict[int, str] = {}
        self._num_added = 0
        self.reserves: Mapping[str, int] = {}
        """Owner -> pages. May be exchanged at any moment, from any thread."""

    def __len__(self) -> int:
        return len(self._owner_of)

    def __contains__(self, page_id: object) -> bool:
        return page_id in self._owner_of

    def __iter__(self) -> Iterator[int]:
        return iter(self._owner_of)

    @property
    def num_reserved(self) -> int:
        """Pages that are in a reserve."""
        if not self.reserves:
            return 0
        return sum(
            min(len(self._of_owner.get(owner, ())), reserve)
            for owner, reserve in self.reserves.items()
        )

    def add(self, page_id: int, owner: str) -> None:
        """As the most recently used one."""
        self._num_added += 1
        self._owner_of[page_id] = owner
        self._of_owner.setdefault(owner, OrderedDict())[page_id] = self._num_added

    def remove(self, page_id: int) -> None:
        owner = self._owner_of.pop(page_id)
        pages = self._of_owner[owner]
        del pages[page_id]
        if not pages:
            del self._of_owner[owner]

    def pop_oldest(self) -> int:
        """Takes the least recently used page that is in no reserve; if all are, of all."""
        page_id, _ = min(
            (next(iter(pages.items())) for pages in self._beyond_reserve()),
            key=lambda page: page[1],
        )
        self.remove(page_id)
        return page_id

    def num_evictable(self, page_ids: Iterable[int]) -> int:
        """By how much fewer pages could be evicted without these, which are all here."""
        counts = Counter(self._owner_of[page_id] for page_id in page_ids)
        if not self.reserves:
            return counts.total()
        return sum(
            min(count, max(0, len(self._of_owner[owner]) - self.reserves.get(owner, 0)))
            for owner, count in counts.items()
        )

    def _beyond_reserve(self) -> list[OrderedDict[int, int]]:
        reserves = self.reserves
        if len(self._of_owner) == 1 or not reserves:
            return list(self._of_owner.values())
        beyond = [
            pages for owner, pages in self._of_owner.items() if len(pages) > reserves.get(owner, 0)
        ]
        return beyond or list(self._of_owner.values())
