"""Server-sent events in the pieces that leave together, padded with comments."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import NamedTuple

from jaxserve.server.pacing import Pacing, paced

_COMMENT = b":"
_COMMENT_END = b"\n\n"
MIN_PADDING = len(_COMMENT + _COMMENT_END)


class Event(NamedTuple):
    data: bytes
    """As it is sent."""
    num_tokens: int = 0


async def paced_events(events: AsyncIterator[Event], pacing: Pacing) -> AsyncIterator[bytes]:
    """What goes into each write: one event, or those that `pacing` keeps together, padded by a
    comment, which clients skip."""
    # Generators, which their type, an iterator, does not say.
    if pacing.is_immediate:
        async with aclosing(events):  # type: ignore[type-var]
            async for event in events:
                yield event.data
        return
    batches = paced(
        events,
        pacing,
        num_tokens=lambda event: event.num_tokens,
        fits=lambda batch: len(_padded(batch, pacing)) == pacing.pad_bytes,
    )
    async with aclosing(events), aclosing(batches):  # type: ignore[type-var]
        async for batch in batches:
            yield _padded(batch, pacing)


def _padded(events: Sequence[Event], pacing: Pacing) -> bytes:
    data = b"".join(event.data for event in events)
    if pacing.pad_bytes is None:
        return data
    missing = pacing.padded_size(max(1, len(data)), MIN_PADDING) - len(data)
    if not missing:
        return data
    return data + _COMMENT + b"." * (missing - MIN_PADDING) + _COMMENT_END
