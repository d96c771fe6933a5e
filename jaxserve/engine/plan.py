"""StepPlan: what one compiled step does, as plain frozen values.

The scheduler makes a plan, the executor runs it, `commit` gets it back with
the results. A plan holds everything the executor needs (page-table deltas and
slot loads included), so a recorded sequence of plans can be replayed.

Row order in the step: decode chunks first (one row each), then prefill chunks
in plan order, each a run of consecutive rows. Rows after the last chunk are
padding up to `num_rows_bucket`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxserve.engine.sampling_params import SamplingParams

NO_TOKEN = -1
"""In results: the model gave no finite logits, so there is no token."""

TAKE_FROM_SLOT = -1
"""Of a row: use the slot's last sampled token."""


class Chunk(NamedTuple):
    """Consecutive positions of one sequence, computed in one step.

    A *decode* chunk is one row whose token is the last one that was sampled
    for its slot; it stays on the device (`token_ids` is empty). A *prefill*
    chunk carries its token ids; after a preemption these include generated
    tokens that are computed again.
    """

    request_id: str
    slot: int
    start: int
    """Absolute position of the first row."""
    num_tokens: int
    token_ids: tuple[int, ...]
    """Empty for a decode chunk, else `num_tokens` ids."""
    samples: bool
    """The last row's logits give the sequence's next token."""
    new_pages: tuple[int, ...]
    """Page ids appended to the slot's page table before this step. A slot
    that is loaded starts with an empty table; its first chunk brings the pages
    found in the prefix cache, then those that the policy grants: of this chunk
    at least, usually of every token known so far."""
    logprob_targets: tuple[int, ...] = ()
    """Prompt logprobs: row i is scored against target i (the next prompt
    token). Shorter than the chunk by one when its last row samples. A chunk
    scores from its first row on or not at all."""
    num_drafts: int = 0
    """Of the last tokens, those that are guesses: each of them and the row before them samples.
    The first token is then the request's last one, `TAKE_FROM_SLOT`, or a guess as well."""

    @property
    def is_decode(self) -> bool:
        return not self.token_ids

    @property
    def num_sample_rows(self) -> int:
        return len(self.logprob_targets) + int(self.samples) + self.num_drafts


@dataclass(frozen=True, slots=True)
class Decodes:
    """A step's decode chunks, row by row, in columns.

    A step decodes every running sequence, and a chunk for each would take
    more time than everything else that planning does. Iterating makes them.
    """

    request_ids: tuple[str, ...] = ()
    slots: tuple[int, ...] = ()
    positions: tuple[int, ...] = ()
    """Absolute position of the row, `start` of the chunk."""
    new_pages: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """(row, its `new_pages`) of those rows that get any, ascending."""

    @classmethod
    def of(cls, chunks: Iterable[Chunk]) -> Decodes:
        chunks = tuple(chunks)
        return cls(
            tuple(chunk.request_id for chunk in chunks),
            tuple(chunk.slot for chunk in chunks),
            tuple(chunk.start for chunk in chunks),
            tuple((row, chunk.new_pages) for row, chunk in enumerate(chunks) if chunk.new_pages),
        )

    def __len__(self) -> int:
        return len(self.slots)

    def __iter__(self) -> Iterator[Chunk]:
        new_pages = dict(self.new_pages)
        for row, request_id in enumerate(self.request_ids):
            pages = new_pages.get(row, ())
            yield Chunk(request_id, self.slots[row], self.positions[row], 1, (), True, pages)


@dataclass(frozen=True, slots=True)
class SlotLoad:
    """A slot gets a (new or resumed) request before the step runs."""

    slot: int
    request_id: str
    sampling: SamplingParams
    seed: int
    """Unsigned 64-bit; the RNG key of a token is (seed, absolute position)."""
    prompt_token_ids: tuple[int, ...]
    output_token_ids: tuple[int, ...]
    """Not empty when the request resumes after a preemption."""
    stop_token_ids: tuple[int, ...]
    """EOS ids (unless ignored) and the request's stop ids: masked until
    `min_tokens` tokens are out."""
    adapter_index: int = 0
    """Place of its adapter in the pool; 0 without one."""


@dataclass(frozen=True, slots=True)
class MaskLoad:
    """A slot's next token must be one of these."""

    slot: int
    words: bytes
    """uint32 `[ceil(V / 32)]`, little-endian: bit i of word w allows token 32 w + i."""


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One row that goes through the LM head."""

    slot: int
    row: int
    """Index into the step's flat rows."""
    position: int
    """Absolute position of that row; the sampled token stands at position + 1."""
    target: int
    """-1: sample the next token. Else: report this token id's logprob."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. Hashable and comparable; see the module's docstring."""

    step_id: int
    num_rows_bucket: int
    """Rows of the executable that runs it."""
    decodes: Decodes
    prefills: tuple[Chunk, ...]
    slot_loads: tuple[SlotLoad, ...] = ()
    preempted: tuple[str, ...] = ()
    """Requests that lost their pages and slot while this plan was made."""
    mask_loads: tuple[MaskLoad, ...] = ()
    """After `slot_loads`; one at most for a slot. A slot that is loaded allows every token."""

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return (*self.decodes, *self.prefills)

    @property
    def new_pages(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """(slot, page ids appended to its table) of the chunks that bring some."""
        for row, page_ids in self.decodes.new_pages:
            yield self.decodes.slots[row], page_ids
        for chunk in self.prefills:
            if chunk.new_pages:
                yield chunk.slot, chunk.new_pages

    @property
    def num_tokens(self) -> int:
        return len(self.decodes) + sum(chunk.num_tokens for chunk in self.prefills)

    @property
    def num_sample_rows(self) -> int:
        return len(self.decodes) + sum(chunk.num_sample_rows for chunk in self.prefills)

    def sample_rows(self) -> Iterator[SampleRow]:
        """Rows through the LM head, in the order of `StepResults`."""
        decodes = zip(self.decodes.slots, self.decodes.positions, strict=True)
        for row, (slot, position) in enumerate(decodes):
            yield SampleRow(slot, row, position, -1)
        yield from self.prefill_sample_rows()

    def prefill_sample_rows(self) -> Iterator[SampleRow]:
        """Those of `sample_rows` after the decodes', each of which is one."""
        row = len(self.decodes)
        for chunk in self.prefills:
            for offset, target in enumerate(chunk.logprob_targets):
                yield SampleRow(chunk.slot, row + offset, chunk.start + offset, target)
            if chunk.samples:
                for last in range(chunk.num_tokens - 1 - chunk.num_drafts, chunk.num_tokens):
                    yield SampleRow(chunk.slot, row + last, chunk.start + last, -1)
            row += chunk.num_tokens


@dataclass(frozen=True, slots=True)
class ReplicaPlans:
    """One step of all replicas of a model, which share weights and nothing of a request."""

    step_id: int
    plans: tuple[StepPlan | None, ...]
    """Of each replica; at least one is not None."""

    @property
    def num_tokens(self) -> int:
        return sum(plan.num_tokens for plan in self.plans if plan is not None)

    @property
    def num_rows_bucket(self) -> int:
        """Rows that all replicas compute together: each as many as the largest plan needs."""
        largest = max(plan.num_rows_bucket for plan in self.plans if plan is not None)
        return largest * len(self.plans)


@dataclass(frozen=True, slots=True)
class StepResults:
    """What came back from the device. `n` = `plan.num_sample_rows`, in the
    order of `plan.sample_rows()`; N is `MAX_TOP_LOGPROBS`.

    Logprobs are those of the raw logits (before penalties, bias, masks and
    temperature); they are zeros in a step where no request wants any.
    """

    step_id: int
    token_ids: np.ndarray
    """int32 [n]: the sampled token, or the target where one was given;
    `NO_TOKEN` where the logits were not finite."""
    logprobs: np.ndarray
    """float32 [n]: logprob of that token."""
    ranks: np.ndarray
    """int32 [n]: how many tokens are at least as likely; 1 is the argmax."""
    top_ids: np.ndarray
    """int32 [n, N], most likely first."""
    top_logprobs: np.ndarray
    """float32 [n, N]."""
