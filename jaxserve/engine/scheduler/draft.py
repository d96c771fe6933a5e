"""StepDraft: a step while a policy fills it.

The draft owns the rules that hold under every policy: the row and LM-head
budgets, pages, slots, preemption, chunk positions. A policy calls its methods
in the order that it wants.

Memory. Admission takes the pages that the policy's `PageGrant` names, less
those found in the prefix cache. Usually these are the pages of every token
known so far (prompt, and on a resume the output too), and a reserve is left. A
partial prefill then never waits for memory; only a decode whose position
starts a new page needs one. If the pages for the decodes don't suffice, the
youngest running requests of the lowest class are preempted, but only once no
step is in flight: until then nothing is planned.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from jaxserve.engine.plan import Chunk, Decodes, MaskLoad, SlotLoad, StepPlan
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler.admission import (
    find_cached_pages,
    num_granted_pages,
    num_reserved_pages,
    register_pages,
)
from jaxserve.engine.scheduler.budget import (
    PrefillLimit,
    StepBudget,
    StepContext,
    smallest_bucket,
)
from jaxserve.engine.scheduler.drafted_chunks import DraftRoom, drafted_chunk
from jaxserve.engine.scheduler.room import StepRoom
from jaxserve.engine.scheduler.rules import PolicyRules
from jaxserve.engine.scheduler.state import DecodeColumns, SchedulerState


class StepDraft:
    """Chunks planned so far, and what room is left.

    Args:
        state: changed in place as chunks are added.
        rules: the policy's.
        budget: asked for a limit of the prefills' time.
        max_rows: row budget of this step.
        in_flight: the plans in flight, oldest first.
        oldest_started_s: when the oldest of them began to run.
        now_s: recorded as `first_scheduled_s` of requests admitted here.
    """

    def __init__(
        self,
        state: SchedulerState,
        *,
        rules: PolicyRules,
        budget: StepBudget,
        max_rows: int,
        in_flight: Sequence[StepPlan],
        oldest_started_s: float,
        now_s: float,
    ) -> None:
        self._state = state
        self._config = state.config
        self._rules = rules
        self._budget = budget
        self._in_flight = in_flight
        self._oldest_started_s = oldest_started_s
        self.now_s = now_s
        self._room = StepRoom(
            state.config, max_rows=max_rows, prefill_limit=self._make_prefill_limit
        )
        self._decode_requests: list[Request] = []
        self._prefill_requests: list[Request] = []
        self._decode_positions: list[int] = []
        self._decode_pages: list[tuple[int, tuple[int, ...]]] = []
        """(row, page ids) of the decodes that get new pages."""
        self._prefills: list[Chunk] = []
        self._slot_loads: list[SlotLoad] = []
        self._mask_loads: list[MaskLoad] = []
        self._preempted: list[str] = []

    @property
    def is_empty(self) -> bool:
        return not self._decode_requests and not self._prefills

    @property
    def decode_requests(self) -> list[Request]:
        """Owners of the plan's decodes, in their order."""
        return self._decode_requests

    @property
    def prefill_requests(self) -> list[Request]:
        """Owners of the plan's prefills, in their order."""
        return self._prefill_requests

    @property
    def num_sample_rows(self) -> int:
        """LM-head rows planned so far."""
        return self._config.num_sample_rows - self._room.num_sample_rows

    @property
    def num_rows_left(self) -> int:
        return self._room.num_rows

    @property
    def next_waiting(self) -> Request | None:
        """The request that `admit_next` would admit."""
        return self._state.waiting.head

    def returned(self) -> list[Request]:
        """Running requests that may be in this step, oldest first within a class."""
        return _by_class(r for r in self._state.running.values() if self._may_follow(r))

    def add_decodes(self) -> bool:
        """One row for each running request whose prefill is complete.

        Call before any prefill is added. Preempts if memory is short. False:
        that has to wait for the steps in flight, and nothing was added.
        """
        assert self.is_empty, "decodes come first"
        ready = self._decode_ready()
        # There is a page for each, whether it needs one or not: the usual case.
        has_pages = len(ready) <= self._state.pages.num_available
        if not has_pages and not self._free_pages_for(ready):
            return False
        if self._state.num_speculating:
            ready = self._add_drafted(ready)
        self._add_ready(ready)
        self._room.take_decodes(len(ready))
        return True

    def partial_prefills(self) -> list[Request]:
        """Running requests with an unfinished prefill that may go on, oldest
        first within a class."""
        if len(self._decode_requests) == len(self._state.running):
            return []
        unfinished = [
            request
            for request in self._state.running.values()
            if request.num_computed_tokens < request.num_prefill_tokens
        ]
        return _by_class(filter(self._may_follow, unfinished))

    def add_prefill(self, request: Request) -> bool:
        """The next chunk of a running request, as long as there is room.

        True if that completes its prefill.
        """
        start = request.num_computed_tokens
        num_tokens = self._room.prefill_tokens(request, start)
        if num_tokens > 0:
            self._add_prefill_chunk(request, start, num_tokens, new_pages=())
        return request.num_computed_tokens == request.num_prefill_tokens

    def advance(self, request: Request) -> bool:
        """The next decode or chunk of a running request, if there is room for it.

        Takes the pages that it needs, from the last in `returned` order if
        memory is short. False: nothing went in for want of memory.
        """
        if request.slot is None:  # Preempted in this step.
            return True
        start = request.num_computed_tokens
        is_decode = start >= request.num_prefill_tokens
        if is_decode:
            num_tokens = int(self._room.has_decode and self._can_decode(request))
        else:
            num_tokens = self._room.prefill_tokens(request, start)
        if num_tokens == 0:
            return True
        num_new_pages = self._state.num_pages_for(start + num_tokens) - len(request.page_ids)
        while num_new_pages > self._state.pages.num_available:
            if self._in_flight:
                return False
            victim = self._victim()
            self._preempt(victim)
            if victim is request:
                return False
        if is_decode:
            self._add_ready([request])
            self._room.take_decodes(1)
            return True
        new_pages = self._state.pages.allocate(num_new_pages) if num_new_pages > 0 else []
        request.page_ids.extend(new_pages)
        self._add_prefill_chunk(request, start, num_tokens, new_pages=tuple(new_pages))
        return True

    def admit_next(self) -> bool:
        """Admits the head of the queue: a slot, pages and a first chunk.

        True if the whole prefill went in, so that the next one may follow.
        """
        state = self._state
        request = state.waiting.head
        if request is None or self._preempted or not state.free_slots:
            return False
        # After a preemption its next mask may still be on its way. From here on it stays.
        if not request.has_mask:
            return False
        cached_pages = find_cached_pages(self._state, request)
        start = len(cached_pages) * self._config.page_size
        request.num_prefill_tokens = request.num_tokens
        request.max_computed_tokens = request.num_prompt_tokens + request.max_tokens - 1
        num_tokens = self._room.prefill_tokens(request, start)
        if num_tokens == 0 or not self._may_be_cut(request, num_tokens, start):
            return False
        grant = self._rules.page_grant
        num_new_pages = num_granted_pages(state, grant, request, start + num_tokens)
        num_new_pages -= len(cached_pages)
        num_left = state.pages.num_available - state.pages.num_unheld(cached_pages) - num_new_pages
        if num_left < num_reserved_pages(state, self._rules, self._budget, request, start):
            return False
        self._take_slot(request, cached_pages, num_new_pages)
        self._add_prefill_chunk(request, start, num_tokens, new_pages=tuple(request.page_ids))
        return request.num_computed_tokens == request.num_prefill_tokens

    def relegate(self, request: Request) -> None:
        """Marks a request that waits, and moves it to where the queue's key then puts it."""
        request.is_relegated = True
        self._state.waiting.reorder(request)

    def finish(self, step_id: int) -> StepPlan | None:
        """The plan, or None if nothing went in."""
        if self.is_empty:
            return None
        requests = self._decode_requests
        num_rows = sum(chunk.num_tokens for chunk in self._prefills) + len(requests)
        return StepPlan(
            step_id=step_id,
            num_rows_bucket=smallest_bucket(self._config.buckets, num_rows),
            decodes=Decodes(
                *self._ids_and_slots(requests),
                tuple(self._decode_positions),
                tuple(self._decode_pages),
            ),
            prefills=tuple(self._prefills),
            slot_loads=tuple(self._slot_loads),
            preempted=tuple(self._preempted),
            mask_loads=tuple(self._mask_loads),
        )

    def _ids_and_slots(self, requests: list[Request]) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Columns of the plan: those of the step before, as long as nobody comes or goes."""
        columns = self._state.decode_columns
        if columns is None or columns.requests != requests:
            columns = DecodeColumns.of(requests)
            self._state.decode_columns = columns
        return columns.request_ids, columns.slots

    def _decode_ready(self) -> list[Request]:
        """Requests that can decode now."""
        ready = [
            r
            for r in self._state.running.values()
            if r.num_prefill_tokens <= r.num_computed_tokens < r.max_computed_tokens
        ]
        if not self._config.chain_decodes:
            ready = [request for request in ready if not request.num_in_flight_steps]
        if self._state.num_masked:
            ready = [request for request in ready if request.has_mask]
        if self._state.num_speculating:
            ready = [r for r in ready if r.speculation is None or not r.speculation.sits_out]
        most = self._room.num_seqs
        return ready[:most] if len(ready) > most else ready

    def _free_pages_for(self, ready: list[Request]) -> bool:
        """Preempts until there are pages for the decodes of `ready`, which loses the victims.

        False: that has to wait for the steps in flight.
        """
        num_pages = sum(map(self._needs_page, ready))
        while num_pages > self._state.pages.num_available:
            if self._in_flight:
                return False
            victim = self._victim()
            if victim in ready:
                ready.remove(victim)
                num_pages -= self._needs_page(victim)
            self._preempt(victim)
        return True

    def _can_decode(self, request: Request) -> bool:
        """As in `_decode_ready`, for one request whose prefill is complete."""
        returned = self._config.chain_decodes or not request.num_in_flight_steps
        may_decode = request.num_computed_tokens < request.max_computed_tokens
        return returned and may_decode and request.has_mask

    def _victim(self) -> Request:
        """The youngest running request of the lowest class."""
        return max(reversed(self._state.running.values()), key=lambda r: r.generation.priority)

    def _preempt(self, victim: Request) -> None:
        self._state.preempt(victim)
        self._preempted.append(victim.request_id)

    def _needs_page(self, request: Request) -> bool:
        return request.num_computed_tokens == len(request.page_ids) * self._config.page_size

    def _may_follow(self, request: Request) -> bool:
        """Whether it may be in this step although it may be in one in flight."""
        if self._config.chain_decodes or not request.num_in_flight_steps:
            return True
        is_prefill = request.num_computed_tokens < request.num_prefill_tokens
        return self._config.stream_chunks and is_prefill

    def _may_be_cut(self, request: Request, num_tokens: int, start: int) -> bool:
        """Whether a prefill may begin with a chunk of `num_tokens`."""
        if not self._rules.whole_prompts or request.is_scored:
            return True
        return start + num_tokens == request.num_prefill_tokens

    def _add_ready(self, requests: Sequence[Request]) -> None:
        """Their next decodes, with the pages that those need. The pages are there.

        Loops without calls: they run for every sequence in every step.
        """
        if self._state.num_masked:
            for request in requests:
                self._load_mask(request)
        page_size, first_row = self._config.page_size, len(self._decode_requests)
        positions = [request.num_computed_tokens for request in requests]
        for index, position in enumerate(positions):
            if position % page_size:
                continue
            request = requests[index]
            if position == len(request.page_ids) * page_size:
                new_pages = self._state.pages.allocate(1)
                request.page_ids += new_pages
                self._decode_pages.append((first_row + index, tuple(new_pages)))
        for request in requests:
            request.num_computed_tokens += 1
            request.num_in_flight_steps += 1
        self._decode_positions += positions
        self._decode_requests += requests

    def _add_drafted(self, ready: Sequence[Request]) -> list[Request]:
        """Those of `ready` whose next tokens are guessed, as chunks; returns the plain decodes.

        There is a row and a page for each of `ready`; drafts take what is left of both.
        """
        plain, state = [], self._state
        room = DraftRoom(
            self._config,
            self._room,
            state.pages.num_available,
            len(ready),
            shares_step=bool(state.waiting) or bool(self.partial_prefills()),
        )
        for request in ready:
            token_ids: tuple[int, ...] | None = ()
            if request.speculation is not None:
                token_ids = request.speculation.next_rows(request, room.max_drafts(request))
            if token_ids:
                room.take(request, len(token_ids) - 1)
                chunk = drafted_chunk(state, request, token_ids)
                self._prefills.append(chunk)
                self._prefill_requests.append(request)
                self._room.take_chunk(chunk)
            elif token_ids is not None:
                plain.append(request)
        return plain

    def _make_prefill_limit(self) -> PrefillLimit:
        return self._budget.prefill_limit(
            StepContext(
                now_s=self.now_s,
                buckets=self._config.buckets,
                decodes=self._decode_requests,
                in_flight=self._in_flight,
                oldest_started_s=self._oldest_started_s,
            )
        )

    def _add_prefill_chunk(
        self, request: Request, start: int, num_tokens: int, new_pages: tuple[int, ...]
    ) -> None:
        end = start + num_tokens
        targets: tuple[int, ...] = ()
        if request.has_unscored_prompt and start == request.num_prompt_logprobs:
            targets = request.generation.prompt_token_ids[start + 1 : end + 1]
            request.num_prompt_logprobs += len(targets)
        assert request.slot is not None
        chunk = Chunk(
            request_id=request.request_id,
            slot=request.slot,
            start=start,
            num_tokens=num_tokens,
            token_ids=request.known_token_ids(start, end),
            samples=end == request.num_prefill_tokens,
            new_pages=new_pages,
            logprob_targets=targets,
        )
        self._prefills.append(chunk)
        self._prefill_requests.append(request)
        self._room.take_chunk(chunk)
        if chunk.samples:
            self._load_mask(request)
        request.num_computed_tokens = end
        request.num_in_flight_steps += 1
        register_pages(self._state, request, end)

    def _load_mask(self, request: Request) -> None:
        """Brings the mask of its next token, if it has one, to its slot, unless that holds it."""
        masks = request.masks
        if masks is not None and masks.words != masks.loaded:
            assert request.slot is not None
            self._mask_loads.append(MaskLoad(request.slot, masks.words))
            masks.loaded = masks.words

    def _take_slot(self, request: Request, cached_pages: list[int], num_new_pages: int) -> None:
        state = self._state
        state.waiting.remove(request.request_id)
        state.running[request.request_id] = request
        state.pages.share(cached_pages)
        request.page_ids = cached_pages + state.pages.allocate(num_new_pages)
        request.num_registered_pages = len(cached_pages)
        request.slot = state.free_slots.pop()
        if request.masks is not None:
            request.masks.loaded = None
            state.num_masked += 1
        if request.speculation is not None:
            request.speculation.begin_life()
            state.num_speculating += 1
        if request.first_scheduled_s is None:
            request.first_scheduled_s = self.now_s
            request.num_cached_tokens = len(cached_pages) * self._config.page_size
            state.prefix_cache_hits += request.num_cached_tokens
            if self._config.prefix_caching and not request.has_unscored_prompt:
                state.prefix_cache_queries += request.num_tokens
        self._slot_loads.append(
            SlotLoad(
                slot=request.slot,
                request_id=request.request_id,
                sampling=request.sampling,
                seed=request.seed,
                prompt_token_ids=request.generation.prompt_token_ids,
                output_token_ids=tuple(request.output_token_ids),
                stop_token_ids=tuple(sorted(request.stop_token_ids)),
                adapter_index=request.adapter_index,
            )
        )


def _by_class(requests: Iterable[Request]) -> list[Request]:
    return sorted(requests, key=lambda request: request.generation.priority)
