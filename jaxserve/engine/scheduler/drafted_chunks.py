"""Chunks that check drafted tokens: how large they may be, and what they take."""

from __future__ import annotations

from jaxserve.engine.plan import Chunk
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler.budget import smallest_bucket
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.room import StepRoom
from jaxserve.engine.scheduler.state import SchedulerState


class DraftRoom:
    """What drafted tokens may take of a step and of the pages, beside a row and a page for each
    sequence that decodes.

    Args:
        config: with `speculation`.
        room: of the step, before anything of the decodes was taken.
        num_pages: that are free.
        num_decodes: sequences that decode, drafted or not.
        shares_step: prefills wait, which get at least half of the rows that are left.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        room: StepRoom,
        num_pages: int,
        num_decodes: int,
        *,
        shares_step: bool,
    ) -> None:
        assert config.speculation is not None
        self._page_size = config.page_size
        self._num_rows = min(room.num_rows, room.num_sample_rows) - num_decodes
        if shares_step:
            self._num_rows //= 2
        if not config.speculation.may_grow_step:
            edge = smallest_bucket(config.buckets, num_decodes)
            self._num_rows = min(self._num_rows, edge - num_decodes)
        self._num_pages = num_pages - num_decodes - config.num_watermark_pages

    def max_drafts(self, request: Request) -> int:
        """Drafted tokens that the next chunk of `request` may have; may be below 1."""
        position = request.num_computed_tokens
        held = max(len(request.page_ids), position // self._page_size + 1)
        num_positions = (held + max(0, self._num_pages)) * self._page_size
        longest = min(num_positions, request.max_computed_tokens)
        return min(self._num_rows, longest - position - 1)

    def take(self, request: Request, num_drafts: int) -> None:
        """That many drafted tokens of `request` go in."""
        position = request.num_computed_tokens
        held = max(len(request.page_ids), position // self._page_size + 1)
        self._num_rows -= num_drafts
        self._num_pages -= max(0, (position + num_drafts) // self._page_size + 1 - held)


def drafted_chunk(state: SchedulerState, request: Request, token_ids: tuple[int, ...]) -> Chunk:
    """The next chunk of `request`: a token, and drafted ones for which a `DraftRoom` has room.

    It gets the pages that it needs. Unlike a prompt's they are offered to nobody, since what they
    hold may be wrong.
    """
    assert request.slot is not None
    position = request.num_computed_tokens
    request.num_computed_tokens += len(token_ids)
    request.num_in_flight_steps += 1
    num_new = state.num_pages_for(request.num_computed_tokens) - len(request.page_ids)
    new_pages = state.pages.allocate(num_new) if num_new > 0 else []
    request.page_ids += new_pages
    return Chunk(
        request_id=request.request_id,
        slot=request.slot,
        start=position,
        num_tokens=len(token_ids),
        token_ids=token_ids,
        samples=True,
        new_pages=tuple(new_pages),
        num_drafts=len(token_ids) - 1,
    )
