"""Pacing: when a stream's messages leave, and how large they look.

Messages that leave as tokens come tell by their times and sizes what is written (arXiv 2511.03675),
and never let a radio sleep. Waiting and padding hide some of it; only `strict` hides all but the
length of the answer, since then a message leaves at every tick, with or without tokens.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, TypeVar

from jaxserve.errors import InvalidRequest

T = TypeVar("T")

MAX_FLUSH_MS = 10_000
MAX_FLUSH_TOKENS = 256
MIN_PAD_BYTES = 64
MAX_PAD_BYTES = 16_384
MAX_AHEAD_TOKENS = 512
"""Read ahead of the client; what comes then waits in the engine, which has a bound of its own."""


@dataclass(frozen=True, slots=True)
class Pacing:
    """Of a server, or of a request. The first token leaves at once, unless `strict`, and so does
    whatever comes last."""

    flush_ms: int | None = None
    """At least so long between two messages."""
    flush_tokens: int | None = None
    """At least so many tokens in a message."""
    pad_bytes: int | None = None
    """A message is padded to a multiple of this."""
    strict: bool = False
    """A message leaves every `flush_ms`, of `pad_bytes`, whether or not there are tokens."""

    @property
    def is_immediate(self) -> bool:
        """Messages leave as they come, and as they are."""
        return self == IMMEDIATE

    def validate(self, name: Callable[[str], str] = str) -> None:
        """Raises InvalidRequest for a field out of its bounds, or one that is missing.

        Args:
            name: the client's name of a field.
        """
        self._check_bounds(name)
        if self.strict and (self.flush_ms is None or self.pad_bytes is None):
            raise InvalidRequest(name("strict"), "needs flush_ms and pad_bytes")
        if self.strict and self.flush_tokens is not None:
            raise _no_counting(name)

    def _check_bounds(self, name: Callable[[str], str]) -> None:
        bounds = {
            "flush_ms": (1, MAX_FLUSH_MS),
            "flush_tokens": (1, MAX_FLUSH_TOKENS),
            "pad_bytes": (MIN_PAD_BYTES, MAX_PAD_BYTES),
        }
        for field, (low, high) in bounds.items():
            value = getattr(self, field)
            if value is not None and not low <= value <= high:
                raise InvalidRequest(name(field), f"must be in [{low}, {high}], not {value}")

    def of_request(self, asked: Pacing, name: Callable[[str], str]) -> Pacing:
        """This server's pacing for a request that asks for `asked`: the coarser of each.

        Raises InvalidRequest naming a field of `asked`.
        """
        asked._check_bounds(name)
        strict = self.strict or asked.strict
        if strict and asked.flush_tokens is not None:
            raise _no_counting(name)
        raised = Pacing(
            flush_ms=_larger(self.flush_ms, asked.flush_ms),
            flush_tokens=None if strict else _larger(self.flush_tokens, asked.flush_tokens),
            pad_bytes=_larger(self.pad_bytes, asked.pad_bytes),
            strict=strict,
        )
        raised.validate(name)
        return raised

    def padded_size(self, num_bytes: int, min_padding: int) -> int:
        """Bytes of a message that is padded.

        Args:
            num_bytes: without padding.
            min_padding: fewest bytes that padding takes, if there is any.
        """
        if self.pad_bytes is None:
            return num_bytes
        size = -(-num_bytes // self.pad_bytes) * self.pad_bytes
        return size + self.pad_bytes if 0 < size - num_bytes < min_padding else size


IMMEDIATE = Pacing()


def _no_counting(name: Callable[[str], str]) -> InvalidRequest:
    message = "would tell how fast tokens come: leave it out when strict"
    return InvalidRequest(name("flush_tokens"), message)


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)


async def paced(
    items: AsyncIterator[T],
    pacing: Pacing,
    *,
    num_tokens: Callable[[T], int],
    fits: Callable[[Sequence[T]], bool],
) -> AsyncIterator[list[T]]:
    """What each message holds, when it is to leave; empty ones in strict mode only.

    Args:
        items: the stream; an exception of it comes after what was before it.
        num_tokens: of an item.
        fits: whether some items go into one message of `pad_bytes`; asked in strict mode.
    """
    async with _ReadAhead(items, num_tokens) as ahead:
        batches = _ticking(ahead, pacing, fits) if pacing.strict else _holding(ahead, pacing)
        # Generators, which their type, an iterator, does not say.
        async with aclosing(batches):  # type: ignore[type-var]
            async for batch in batches:
                yield batch
        if ahead.error is not None:
            raise ahead.error


async def _holding(ahead: _ReadAhead[T], pacing: Pacing) -> AsyncIterator[list[T]]:
    loop = asyncio.get_running_loop()
    wait_s, fewest = (pacing.flush_ms or 0) / 1000, pacing.flush_tokens or 1
    last_s: float | None = None
    while True:
        await ahead.until(lambda: bool(ahead.items))
        if last_s is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(last_s + wait_s):
                    await ahead.until(lambda: False)
            await ahead.until(lambda: ahead.num_tokens >= fewest)
        if not ahead.items:
            return
        if ahead.num_tokens:
            last_s = loop.time()
        yield ahead.take(len(ahead.items))


async def _ticking(
    ahead: _ReadAhead[T], pacing: Pacing, fits: Callable[[Sequence[T]], bool]
) -> AsyncIterator[list[T]]:
    loop = asyncio.get_running_loop()
    assert pacing.flush_ms is not None
    interval_s = pacing.flush_ms / 1000
    next_s = loop.time() + interval_s
    while True:
        await asyncio.sleep(next_s - loop.time())
        # A client that was slow gets no burst afterwards: ticks that were missed are left out.
        next_s += interval_s * max(1, 1 + (loop.time() - next_s) // interval_s)
        batch = list(ahead.items)
        while len(batch) > 1 and not fits(batch):
            batch.pop()
        ahead.take(len(batch))
        is_last = ahead.has_ended and not ahead.items
        yield batch
        if is_last:
            return


class _ReadAhead(Generic[T]):
    """Reads a stream in a task of its own, so that a wait for time cancels no read."""

    def __init__(self, items: AsyncIterator[T], num_tokens: Callable[[T], int]) -> None:
        self._source = items
        self._num_tokens_of = num_tokens
        self._changed = asyncio.Event()
        self._room = asyncio.Event()
        self.items: deque[T] = deque()
        self.num_tokens = 0
        self.has_ended = False
        self.error: Exception | None = None

    async def __aenter__(self) -> _ReadAhead[T]:
        self._task = asyncio.create_task(self._read())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits for what a new item makes true, or for the stream's end."""
        while not (condition() or self.has_ended):
            self._changed.clear()
            await self._changed.wait()

    def take(self, count: int) -> list[T]:
        taken = [self.items.popleft() for _ in range(count)]
        self.num_tokens -= sum(map(self._num_tokens_of, taken))
        self._room.set()
        return taken

    async def _read(self) -> None:
        try:
            async for item in self._source:
                self.items.append(item)
                self.num_tokens += self._num_tokens_of(item)
                self._changed.set()
                while self.num_tokens >= MAX_AHEAD_TOKENS:
                    self._room.clear()
                    await self._room.wait()
        except Exception as error:  # Whoever reads the stream gets it.
            self.error = error
        finally:
            self.has_ended = True
            self._changed.set()
