"""StepDraft: a step while a policy fills it.

The draft owns the rules that hold under every policy: the row and LM-head
budgets, pages, slots, preemption, chunk positions. A policy calls its methods
in the order that it wants.

Memory. Admission takes the pages of every token known so far (prompt, and on
a resume the output too), less those found in the prefix cache, and leaves a
reserve. A partial prefill therefore never waits for memory; only a decode
whose position starts a new page needs one. If the pages for the decodes
don't suffice, the youngest running requests are preempted, but only once no
step is in flight: until then nothing is planned.
"""

from __future__ import annotations

from jaxserve.engine.pages import page_key, root_key
from jaxserve.engine.plan import Chunk, SlotLoad, StepPlan
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler.budget import smallest_bucket
from jaxserve.engine.scheduler.state import SchedulerState


class StepDraft:
    """Chunks planned so far, and what room is left.

    Args:
        state: changed in place as chunks are added.
        max_rows: row budget of this step.
        pipe_empty: no step is in flight.
        now_s: recorded as `first_scheduled_s` of requests admitted here.
    """

    def __init__(
        self, state: SchedulerState, *, max_rows: int, pipe_empty: bool, now_s: float
    ) -> None:
        self._state = state
        self._config = state.config
        self._pipe_empty = pipe_empty
        self._now_s = now_s
        self.num_rows_left = max_rows
        self.num_sample_rows_left = state.config.max_num_seqs
        self.requests: list[Request] = []
        """Owners of the chunks, in the order of the plan's chunks."""
        self._decodes: list[Chunk] = []
        self._prefills: list[Chunk] = []
        self._slot_loads: list[SlotLoad] = []
        self._preempted: list[str] = []

    @property
    def num_sample_rows(self) -> int:
        """LM-head rows planned so far."""
        return self._config.max_num_seqs - self.num_sample_rows_left

    def add_decodes(self) -> bool:
        """One row for each running request whose prefill is complete.

        Call before any prefill is added. Preempts if memory is short. False:
        that has to wait for the steps in flight, and nothing was added.
        """
        assert not self.requests, "decodes come first: a plan's chunks are in row order"
        ready, num_pages = self._decode_ready()
        while num_pages > self._state.pages.num_available:
            if not self._pipe_empty:
                return False
            victim = next(reversed(self._state.running.values()))
            if victim in ready:
                ready.remove(victim)
                num_pages -= self._needs_page(victim)
            self._state.preempt(victim)
            self._preempted.append(victim.request_id)
        for request in ready:
            self._add_decode(request)
        # A budget may ask for less than the decodes take; they go in all the same.
        self.num_rows_left = max(0, self.num_rows_left - len(ready))
        self.num_sample_rows_left -= len(ready)
        return True

    def partial_prefills(self) -> list[Request]:
        """Running requests with an unfinished prefill that may go on, oldest first."""
        return [
            request
            for request in self._state.running.values()
            if request.num_computed_tokens < request.num_prefill_tokens
            and self._may_follow(request)
        ]

    def add_prefill(self, request: Request) -> bool:
        """The next chunk of a running request, as long as there is room.

        True if that completes its prefill.
        """
        start = request.num_computed_tokens
        num_tokens = self._num_prefill_tokens(request, start)
        if num_tokens > 0:
            self._add_prefill_chunk(request, start, num_tokens, new_pages=())
        return request.num_computed_tokens == request.num_prefill_tokens

    def admit_next(self) -> bool:
        """Gives the head of the queue a slot, its pages and a first chunk.

        True if the whole prefill went in, so that the next one may follow.
        """
        state = self._state
        request = state.waiting.head
        if request is None or self._preempted or not state.free_slots:
            return False
        cached_pages = self._find_cached_pages(request)
        start = len(cached_pages) * self._config.page_size
        num_new_pages = state.num_pages_for(request.num_tokens) - len(cached_pages)
        num_taken = num_new_pages + state.pages.num_unheld(cached_pages)
        if state.pages.num_available - num_taken < self._reserved_pages(request, start):
            return False
        request.num_prefill_tokens = request.num_tokens
        num_tokens = self._num_prefill_tokens(request, start)
        if num_tokens == 0:
            return False
        self._take_slot(request, cached_pages, num_new_pages)
        self._add_prefill_chunk(request, start, num_tokens, new_pages=tuple(request.page_ids))
        return request.num_computed_tokens == request.num_prefill_tokens

    def finish(self, step_id: int) -> StepPlan | None:
        """The plan, or None if nothing went in."""
        if not self.requests:
            return None
        num_rows = sum(chunk.num_tokens for chunk in self._prefills) + len(self._decodes)
        return StepPlan(
            step_id=step_id,
            num_rows_bucket=smallest_bucket(self._config.buckets, num_rows),
            decodes=tuple(self._decodes),
            prefills=tuple(self._prefills),
            slot_loads=tuple(self._slot_loads),
            preempted=tuple(self._preempted),
        )

    def _decode_ready(self) -> tuple[list[Request], int]:
        """Requests that can decode now, and how many pages they need for it."""
        page_size = self._config.page_size
        chained = self._config.chain_decodes
        ready, num_pages = [], 0
        for request in self._state.running.values():
            position = request.num_computed_tokens
            if position < request.num_prefill_tokens:
                continue
            if len(request.output_token_ids) + request.num_pending_tokens >= request.max_tokens:
                continue
            if request.num_in_flight_steps and not chained:
                continue
            ready.append(request)
            if position == len(request.page_ids) * page_size:
                num_pages += 1
        return ready, num_pages

    def _needs_page(self, request: Request) -> bool:
        return request.num_computed_tokens == len(request.page_ids) * self._config.page_size

    def _may_follow(self, request: Request) -> bool:
        return self._config.chain_decodes or not request.num_in_flight_steps

    def _add_decode(self, request: Request) -> None:
        position = request.num_computed_tokens
        new_pages: tuple[int, ...] = ()
        if position == len(request.page_ids) * self._config.page_size:
            new_pages = tuple(self._state.pages.allocate(1))
            request.page_ids.extend(new_pages)
        assert request.slot is not None
        self._decodes.append(
            Chunk(request.request_id, request.slot, position, 1, (), True, new_pages)
        )
        self.requests.append(request)
        request.num_computed_tokens = position + 1
        request.num_pending_tokens += 1
        request.num_in_flight_steps += 1

    def _num_prefill_tokens(self, request: Request, start: int) -> int:
        """Size of the chunk at `start` that the budgets allow; may be 0."""
        remaining = request.num_prefill_tokens - start
        num_tokens = min(remaining, self.num_rows_left)
        if _scores_prompt(request):
            # Positions before `scored_from` were reported in an earlier life.
            scored_from = request.num_prompt_logprobs
            if start < scored_from:
                return min(num_tokens, scored_from - start)
            return min(num_tokens, self.num_sample_rows_left)
        if num_tokens == remaining and self.num_sample_rows_left == 0:
            return num_tokens - 1
        return num_tokens

    def _add_prefill_chunk(
        self, request: Request, start: int, num_tokens: int, new_pages: tuple[int, ...]
    ) -> None:
        end = start + num_tokens
        targets: tuple[int, ...] = ()
        if _scores_prompt(request) and start == request.num_prompt_logprobs:
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
        self.requests.append(request)
        self.num_rows_left -= num_tokens
        self.num_sample_rows_left -= chunk.num_sample_rows
        request.num_computed_tokens = end
        request.num_pending_tokens += chunk.samples
        request.num_in_flight_steps += 1

    def _find_cached_pages(self, request: Request) -> list[int]:
        """Registered pages of its longest known prefix, at least one token short of all."""
        if not self._config.prefix_caching or _scores_prompt(request):
            return []
        size = self._config.page_size
        num_pages = (request.num_tokens - 1) // size
        extend_page_keys(request, num_pages, size)
        token_ids = request.known_token_ids(0, num_pages * size)
        return self._state.pages.find_prefix(request.page_keys[:num_pages], token_ids)

    def _reserved_pages(self, request: Request, start: int) -> int:
        """Pages that must stay available when `request` is admitted.

        The watermark; and for a preempted request at least what the running
        ones can need until its prefill is done. So each life that follows a
        preemption gives a token, and memory never thrashes.
        """
        watermark = self._config.num_watermark_pages
        running = self._state.running.values()
        if not request.num_preemptions or not running:
            return watermark
        prefilling = [r for r in running if r.num_computed_tokens < r.num_prefill_tokens]
        backlog = request.num_tokens - start
        backlog += sum(r.num_prefill_tokens - r.num_computed_tokens for r in prefilling)
        num_rows = self._config.token_budget - len(running)
        if any(_scores_prompt(r) for r in (request, *prefilling)):
            num_rows = self._config.max_num_seqs - len(running)
        num_steps = -(-backlog // num_rows) + len(prefilling) + 1 + self._config.max_in_flight
        growth = 0
        for r in running:
            num_left = r.max_tokens - len(r.output_token_ids) - r.num_pending_tokens
            end = max(r.num_computed_tokens, r.num_prefill_tokens) + min(num_left, num_steps)
            growth += max(0, self._state.num_pages_for(end) - len(r.page_ids))
        return max(watermark, growth)

    def _take_slot(self, request: Request, cached_pages: list[int], num_new_pages: int) -> None:
        state = self._state
        state.waiting.remove(request.request_id)
        state.running[request.request_id] = request
        state.pages.share(cached_pages)
        request.page_ids = cached_pages + state.pages.allocate(num_new_pages)
        request.num_registered_pages = len(cached_pages)
        request.slot = state.free_slots.pop()
        if request.first_scheduled_s is None:
            request.first_scheduled_s = self._now_s
            request.num_cached_tokens = len(cached_pages) * self._config.page_size
            state.prefix_cache_hits += request.num_cached_tokens
            if self._config.prefix_caching and not _scores_prompt(request):
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
            )
        )


def extend_page_keys(request: Request, num_pages: int, page_size: int) -> None:
    """Makes sure that `request.page_keys` covers its first `num_pages` full pages."""
    keys = request.page_keys
    while len(keys) < num_pages:
        parent = keys[-1] if keys else root_key(request.generation.cache_salt)
        start = len(keys) * page_size
        keys.append(page_key(parent, request.known_token_ids(start, start + page_size)))


def _scores_prompt(request: Request) -> bool:
    """Some prompt logprobs have not been planned yet."""
    return (
        request.generation.sampling.prompt_logprobs is not None
        and request.num_prompt_logprobs < request.num_prompt_tokens - 1
    )
