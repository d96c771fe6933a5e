"""An Executor without a model: its "KV" records what was written where.

Each (page, offset) of the simulated pool holds a hash of all tokens up to the
one written there, which is what real KV depends on. A step checks that every
row finds its whole context in the pages of its slot, so a wrong page, offset,
position or token shows at once. The "sampled" token depends on the context,
the position, the seed and the prompt/output boundary, as a real one does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from jaxserve.engine.plan import Chunk, SlotLoad, StepPlan, StepResults
from jaxserve.engine.request import Request
from jaxserve.engine.sampling_params import MAX_TOP_LOGPROBS

VOCAB_SIZE = 40
ROOT = 0x9E3779B97F4A7C15


class DeviceFault(AssertionError):
    """A plan that a real device would have computed garbage from."""


def extend(context: int, token_id: int) -> int:
    return hash((context, token_id))


def context_of(token_ids: Iterable[int]) -> int:
    context = ROOT
    for token_id in token_ids:
        context = extend(context, token_id)
    return context


def sample(context: int, position: int, num_output: int, load: SlotLoad) -> int:
    """Token at `position + 1`. Stop ids are masked for `min_tokens` tokens."""
    for attempt in range(1000):
        key = (context, position, num_output, load.seed, load.sampling.temperature, attempt)
        token_id = hash(key) % VOCAB_SIZE
        if num_output >= load.sampling.min_tokens or token_id not in load.stop_token_ids:
            return token_id
    raise AssertionError("every token is a stop id")


def logprob_of(context: int, token_id: int) -> float:
    return -(hash((context, token_id)) % 1000) / 100


def reference_output(request: Request) -> tuple[list[int], bool]:
    """What `request` alone would give, and whether a stop id ended it."""
    prompt = request.generation.prompt_token_ids
    load = load_of(request)
    context, output = context_of(prompt), []
    while len(output) < request.max_tokens:
        position = len(prompt) + len(output) - 1
        token_id = sample(context, position, len(output), load)
        output.append(token_id)
        context = extend(context, token_id)
        if token_id in load.stop_token_ids and len(output) > load.sampling.min_tokens:
            return output, True
    return output, False


def reference_prompt_logprobs(prompt: tuple[int, ...]) -> list[tuple[int, float]]:
    """(token id, logprob) for every prompt token but the first."""
    context, entries = ROOT, []
    for token_id, target in pairwise(prompt):
        context = extend(context, token_id)
        entries.append((target, logprob_of(context, target)))
    return entries


def load_of(request: Request) -> SlotLoad:
    return SlotLoad(
        slot=0,
        request_id=request.request_id,
        sampling=request.sampling,
        seed=request.seed,
        prompt_token_ids=request.generation.prompt_token_ids,
        output_token_ids=(),
        stop_token_ids=tuple(request.stop_token_ids),
    )


@dataclass(slots=True)
class _Slot:
    load: SlotLoad
    token_ids: list[int]
    """Tokens that the device knows: loaded ones, then its own samples."""
    pages: list[int]


class FakeDevice:
    """Runs plans at once, hands results out later, oldest first."""

    def __init__(self, *, page_size: int, depth: int) -> None:
        self.depth = depth
        self._page_size = page_size
        self._kv: dict[tuple[int, int], int] = {}
        self._slots: dict[int, _Slot] = {}
        self._in_flight: deque[tuple[StepPlan, StepResults]] = deque()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def poison(self, page_ids: Iterable[int]) -> None:
        for page_id in page_ids:
            for offset in range(self._page_size):
                self._kv.pop((page_id, offset), None)

    def can_accept(self) -> bool:
        return len(self._in_flight) < self.depth

    def submit(self, plan: StepPlan) -> None:
        if not self.can_accept():
            raise DeviceFault("more steps in flight than the device is deep")
        for load in plan.slot_loads:
            token_ids = [*load.prompt_token_ids, *load.output_token_ids]
            self._slots[load.slot] = _Slot(load, token_ids, [])
        seen: set[int] = set()
        for chunk in plan.chunks:
            if chunk.slot in seen:
                raise DeviceFault(f"slot {chunk.slot} is twice in step {plan.step_id}")
            seen.add(chunk.slot)
            self._write(chunk)
        # All rows write their KV before any row attends, as in the real step.
        self._in_flight.append((plan, self._attend_and_sample(plan)))

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        if not self._in_flight:
            raise LookupError("nothing is in flight")
        return self._in_flight.popleft()

    def _write(self, chunk: Chunk) -> None:
        slot = self._slots[chunk.slot]
        if slot.load.request_id != chunk.request_id:
            raise DeviceFault(f"slot {chunk.slot} is {slot.load.request_id}'s")
        slot.pages.extend(chunk.new_pages)
        end = chunk.start + chunk.num_tokens
        if end > len(slot.token_ids):
            raise DeviceFault(f"{chunk.request_id}: position {end - 1} is not known on the device")
        token_ids = slot.token_ids[chunk.start : end]
        if chunk.is_decode and (chunk.num_tokens != 1 or end != len(slot.token_ids)):
            raise DeviceFault(f"{chunk.request_id}: a decode takes the last token, not {end - 1}")
        if not chunk.is_decode and list(chunk.token_ids) != token_ids:
            raise DeviceFault(f"{chunk.request_id}: wrong tokens at {chunk.start}")
        if end > len(slot.pages) * self._page_size:
            raise DeviceFault(f"{chunk.request_id}: no page for position {end - 1}")
        context = context_of(slot.token_ids[: chunk.start])
        for position, token_id in enumerate(token_ids, start=chunk.start):
            context = extend(context, token_id)
            self._kv[self._place(slot, position)] = context

    def _attend_and_sample(self, plan: StepPlan) -> StepResults:
        token_ids: list[int] = []
        logprobs: list[float] = []
        for chunk in plan.chunks:
            slot = self._slots[chunk.slot]
            context = ROOT
            contexts = []
            for position in range(chunk.start + chunk.num_tokens):
                context = extend(context, slot.token_ids[position])
                found = self._kv.get(self._place(slot, position))
                if found != context:
                    what = "poison" if found is None else "foreign KV"
                    raise DeviceFault(f"{chunk.request_id}: {what} at position {position}")
                contexts.append(context)
            for offset, target in enumerate(chunk.logprob_targets):
                token_ids.append(target)
                logprobs.append(logprob_of(contexts[chunk.start + offset], target))
            if chunk.samples:
                num_output = len(slot.token_ids) - len(slot.load.prompt_token_ids)
                position = chunk.start + chunk.num_tokens - 1
                token_id = sample(context, position, num_output, slot.load)
                slot.token_ids.append(token_id)
                token_ids.append(token_id)
                logprobs.append(logprob_of(context, token_id))
        return results_of(plan.step_id, token_ids, logprobs)

    def _place(self, slot: _Slot, position: int) -> tuple[int, int]:
        return slot.pages[position // self._page_size], position % self._page_size


def results_of(step_id: int, token_ids: list[int], logprobs: list[float]) -> StepResults:
    """StepResults whose top lists are the token and its successors."""
    ids = np.asarray(token_ids, np.int32)
    values = np.asarray(logprobs, np.float32)
    ranks = np.arange(MAX_TOP_LOGPROBS)
    return StepResults(
        step_id=step_id,
        token_ids=ids,
        logprobs=values,
        ranks=np.ones(len(ids), np.int32),
        top_ids=(ids[:, None] + ranks).astype(np.int32),
        top_logprobs=(values[:, None] - ranks).astype(np.float32),
    )
