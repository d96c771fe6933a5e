"""AdapterNames: which adapters there are, where in the pool, and who may take a place."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass

from jaxserve.errors import AdapterNotFound, NoRoomForAdapter


@dataclass(frozen=True, slots=True)
class ServedAdapter:
    name: str
    index: int
    """Its place in the pool, from 1 on."""
    rank: int
    digest: str
    """SHA-256 of its weights as they are served."""
    path: str
    """As it was given."""


class AdapterNames:
    """Thread-safe. A request holds its adapter's place until its last output.

    Args:
        num_places: of the pool; 0 if there is none.
    """

    def __init__(self, num_places: int) -> None:
        self.lock = threading.RLock()
        """Held while a request gets its adapter and becomes live, so that no place is given away
        between the two."""
        self._free_or_held = range(1, num_places + 1)
        self._by_name: dict[str, ServedAdapter] = {}
        self._reserved: set[int] = set()
        self._num_requests: dict[str, int] = {}
        # With it, no client can make the salt of an adapter's pages.
        self._secret = secrets.token_hex(16)

    def get(self, name: str) -> ServedAdapter:
        """Raises AdapterNotFound."""
        with self.lock:
            adapter = self._by_name.get(name)
            loaded = ", ".join(self._by_name) or "none"
        if adapter is None:
            raise AdapterNotFound(f"no adapter of this name is loaded; there are: {loaded}")
        return adapter

    def find(self, name: str) -> ServedAdapter | None:
        """The adapter of this name, if there is one."""
        return self._by_name.get(name)

    def all(self) -> tuple[ServedAdapter, ...]:
        """In the order in which they were loaded."""
        with self.lock:
            return tuple(self._by_name.values())

    def reserve(self, held: Callable[[], Collection[int]]) -> int:
        """A place that nothing runs on, for `publish` or `give_back`.

        Args:
            held: places of the requests that are live, asked under the lock.

        Raises NoRoomForAdapter.
        """
        with self.lock:
            taken = {one.index for one in self._by_name.values()} | self._reserved
            busy = taken | set(held())
            free = next((index for index in self._free_or_held if index not in busy), None)
            if free is None:
                waits = len(taken) < len(self._free_or_held)
                raise NoRoomForAdapter(
                    "requests still run on an adapter that was unloaded: retry when they are over"
                    if waits
                    else f"all {len(self._free_or_held)} places for adapters (--max-loras) are "
                    "taken: unload one first"
                )
            self._reserved.add(free)
            return free

    def give_back(self, index: int) -> None:
        """A place that was reserved and not published."""
        with self.lock:
            self._reserved.discard(index)

    def publish(self, adapter: ServedAdapter) -> None:
        """New requests for this name get it from now on. An earlier one of the name is gone; what
        runs on it goes on."""
        with self.lock:
            self._by_name.pop(adapter.name, None)
            self._by_name[adapter.name] = adapter
            self._num_requests.setdefault(adapter.name, 0)
            self._reserved.discard(adapter.index)

    def remove(self, name: str) -> ServedAdapter:
        """No new request gets it. Raises AdapterNotFound."""
        with self.lock:
            adapter = self.get(name)
            del self._by_name[name]
            del self._num_requests[name]
            return adapter

    def count_request(self, name: str) -> None:
        """A request for this name was taken, which may have been unloaded since."""
        with self.lock:
            if name in self._num_requests:
                self._num_requests[name] += 1

    def num_requests(self) -> dict[str, int]:
        """Requests taken since the name was loaded, for each that is. As many as there are places
        at most, whatever clients ask for."""
        with self.lock:
            return dict(self._num_requests)

    def cache_salt(self, adapter: ServedAdapter, own_salt: str) -> str:
        """Of the pages of requests with this adapter, which those of the same weights share."""
        return f"{self._secret}/{adapter.digest}/{own_salt}"
