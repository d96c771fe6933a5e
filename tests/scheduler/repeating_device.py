"""An Executor without a model, for drafts: what it says repeats itself, with breaks.

Its "KV" holds, for each (page, offset), all tokens up to the one written there. Rows compute from
what they find in their pages, right or wrong, as a device does; a page that was freed, or that
holds another text than the rows before it, is a fault.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from jaxserve.engine.plan import TAKE_FROM_SLOT, Chunk, SlotLoad, StepPlan, StepResults
from tests.scheduler.fake_device import VOCAB_SIZE, DeviceFault, results_of

Text = tuple[int, ...]


def next_token(text: Text, load: SlotLoad) -> int:
    """What follows `text`: usually what stood some places before, by the request's seed."""
    num_output = len(text) - len(load.prompt_token_ids)
    for attempt in range(1000):
        chance = hash((text, load.seed, attempt))
        period = 1 + load.seed % 5
        copies = chance % 8 and len(text) > period and not attempt
        token_id = text[-period] if copies else chance // 8 % VOCAB_SIZE
        if num_output >= load.sampling.min_tokens or token_id not in load.stop_token_ids:
            return token_id
    raise AssertionError("every token is a stop id")


def whole_output(load: SlotLoad, max_tokens: int) -> Text:
    text = load.prompt_token_ids
    output: Text = ()
    while len(output) < max_tokens:
        output += (next_token(text + output, load),)
        if output[-1] in load.stop_token_ids and len(output) > load.sampling.min_tokens:
            break
    return output


@dataclass(slots=True)
class _Slot:
    load: SlotLoad
    pages: list[int] = field(default_factory=list)
    last_token: int | None = None
    """None: that of any row of a check, so nothing may depend on it."""


@dataclass(frozen=True, slots=True)
class _Written:
    """What stands at a place of the pool."""

    text: Text
    context: int
    """Hash of `text`, token by token."""


_NOTHING = _Written((), 0)


class RepeatingDevice:
    """Runs plans at once, hands results out later, oldest first."""

    def __init__(self, *, page_size: int, depth: int) -> None:
        self._depth = depth
        self._page_size = page_size
        self._kv: dict[tuple[int, int], _Written] = {}
        self._slots: dict[int, _Slot] = {}
        self._in_flight: deque[tuple[StepPlan, StepResults]] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def poison(self, page_ids: Iterable[int]) -> None:
        for page_id in page_ids:
            for offset in range(self._page_size):
                self._kv.pop((page_id, offset), None)

    def restart(self) -> None:
        """Loses the steps in flight and all that was written."""
        self._in_flight.clear()
        self._kv.clear()
        self._slots.clear()

    def submit(self, plan: StepPlan) -> None:
        assert len(self._in_flight) < self._depth
        for load in plan.slot_loads:
            self._slots[load.slot] = _Slot(load)
        token_ids = []
        for chunk in plan.chunks:
            texts = self._write(chunk)
            slot = self._slots[chunk.slot]
            if chunk.samples:
                drawn = [next_token(text, slot.load) for text in texts[-1 - chunk.num_drafts :]]
                slot.last_token = None if chunk.num_drafts else drawn[-1]
                token_ids += drawn
        self._in_flight.append((plan, results_of(plan.step_id, token_ids, [0.0] * len(token_ids))))

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        return self._in_flight.popleft()

    def _write(self, chunk: Chunk) -> list[Text]:
        """The text up to each row."""
        slot = self._slots[chunk.slot]
        if slot.load.request_id != chunk.request_id:
            raise DeviceFault(f"slot {chunk.slot} is {slot.load.request_id}'s")
        slot.pages.extend(chunk.new_pages)
        before = self._read(chunk, slot)
        texts = []
        for row, token_id in enumerate(chunk.token_ids or (TAKE_FROM_SLOT,)):
            known = slot.last_token if token_id == TAKE_FROM_SLOT else token_id
            if known is None or (row and token_id == TAKE_FROM_SLOT):
                raise DeviceFault(f"{chunk.request_id}: the slot's last token is not its own")
            before = _Written((*before.text, known), hash((before.context, known)))
            self._kv[self._place(slot, chunk.start + row)] = before
            texts.append(before.text)
        return texts

    def _read(self, chunk: Chunk, slot: _Slot) -> _Written:
        """What stands before the chunk, all of which must be of one text."""
        places = [self._place(slot, position) for position in range(chunk.start)]
        last = self._kv.get(places[-1], _NOTHING) if places else _NOTHING
        if len(last.text) != chunk.start:
            raise DeviceFault(f"{chunk.request_id}: poison before position {chunk.start}")
        context = 0
        for token_id, place in zip(last.text, places, strict=True):
            context = hash((context, token_id))
            if self._kv.get(place, _NOTHING).context != context:
                raise DeviceFault(f"{chunk.request_id}: foreign KV before position {chunk.start}")
        return last

    def _place(self, slot: _Slot, position: int) -> tuple[int, int]:
        if position >= len(slot.pages) * self._page_size:
            raise DeviceFault(f"{slot.load.request_id}: no page for position {position}")
        return slot.pages[position // self._page_size], position % self._page_size
