"""The scheduler's properties, checked on every plan and commit.

`PropertyMonitor` follows the plans alone: it keeps its own record of every
request and never trusts the scheduler's counters, so a bug in these shows.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace

from jaxserve.engine.plan import Chunk, StepPlan
from jaxserve.engine.request import FinishReason, Request, TokenUpdate
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.scheduler import Scheduler
from tests.scheduler.fake_device import reference_output, reference_prompt_logprobs


@dataclass(frozen=True, slots=True)
class Promises:
    """Which properties a policy has; those that aren't named here all have."""

    stall_free: bool = True
    """S1: a ready decode is in every plan."""
    fills: bool = True
    """S2: no row stays empty while a prefill could have it."""
    whole_prompts: bool = False
    decodes_beside_prefills: bool = True
    admits_in_order: bool = True
    prefills_in_order: bool = True
    """S3"""
    preempts: bool = True
    has_headroom: bool = True
    """S4: few preemptions, and a token in each life after one."""
    plans_per_token: int | None = 1
    """S4: in so many plans the oldest request gets a row; None: in no bound."""
    keeps_watermark: bool = True


_RESERVING = Promises(fills=False, preempts=False, keeps_watermark=False)
PROMISES = {
    "sarathi": Promises(),
    "sarathi_decode_maximal": _RESERVING,
    "orca": replace(_RESERVING, whole_prompts=True),
    "fastertransformer": replace(_RESERVING, whole_prompts=True, decodes_beside_prefills=False),
    "hybrid_only": Promises(whole_prompts=True, fills=False),
    "chunked_only": Promises(
        stall_free=False, fills=False, decodes_beside_prefills=False, plans_per_token=2
    ),
    "vllm_v0": Promises(
        stall_free=False,
        fills=False,
        whole_prompts=True,
        decodes_beside_prefills=False,
        has_headroom=False,
        plans_per_token=None,
    ),
    "vllm_v1": Promises(
        stall_free=False,
        fills=False,
        prefills_in_order=False,
        has_headroom=False,
        plans_per_token=None,
        keeps_watermark=False,
    ),
    "slack": Promises(
        fills=False,
        admits_in_order=False,
        prefills_in_order=False,
        has_headroom=False,
        plans_per_token=None,
    ),
}
WHOLE_PROMPT_POLICIES = {name for name, promises in PROMISES.items() if promises.whole_prompts}


class PropertyViolation(AssertionError):
    """A named property does not hold."""

    def __init__(self, name: str, message: str) -> None:
        super().__init__(f"{name}: {message}")
        self.name = name


def require(condition: bool, name: str, message: str) -> None:
    if not condition:
        raise PropertyViolation(name, message)


@dataclass(slots=True, eq=False)
class Shadow:
    """What the plans and commits say about one request."""

    request: Request
    index: int
    """Order of arrival."""
    reference: list[int]
    stops: bool
    """The reference ends with a stop id."""
    plan_limit: int | None
    """Number of the plan by which it must have finished (S4)."""
    output: list[int] = field(default_factory=list)
    prompt_logprobs: list[tuple[int, float]] = field(default_factory=list)
    slot: int | None = None
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_prefill: int = 0
    num_pending: int = 0
    num_in_flight: int = 0
    num_preemptions: int = 0
    num_admission: int = 0
    num_older: int = 0
    """Older requests that were unfinished when it arrived."""
    has_token_since_resume: bool = True
    finished: FinishReason | None = None

    @property
    def num_known(self) -> int:
        return len(self.request.generation.prompt_token_ids) + len(self.output)

    @property
    def num_output_planned(self) -> int:
        return len(self.output) + self.num_pending


class PropertyMonitor:
    """Checks S1 to S8; a violation raises PropertyViolation with its name.

    Args:
        has_classes: requests differ in priority, so the order of arrival holds
            within a class only, and a low class may wait without bound.
        fixed_size: steps are as large as `token_budget`, whatever they cost.
    """

    def __init__(
        self, scheduler: Scheduler, *, has_classes: bool = False, fixed_size: bool = True
    ) -> None:
        self.scheduler = scheduler
        self.config: SchedulerConfig = scheduler.config
        self.promises = PROMISES[self.config.policy]
        if has_classes:
            self.promises = replace(self.promises, has_headroom=False, plans_per_token=None)
        if has_classes or not fixed_size:
            self.promises = replace(self.promises, fills=False)
        if not fixed_size:
            self.promises = replace(self.promises, plans_per_token=None)
        self.live: dict[str, Shadow] = {}
        """Waiting or running, in order of arrival."""
        self.draining: list[Shadow] = []
        self.in_flight: list[tuple[StepPlan, list[Shadow]]] = []
        self.salt_of_page: dict[int, str] = {}
        self.num_plans = 0
        self.num_arrivals = 0
        self.num_finished = 0
        self.num_admissions = 0

    def arrived(self, request: Request) -> None:
        reference, stops = reference_output(request)
        # The oldest request gets a row in at least one of `max_in_flight`
        # plans, and needs at most one plan a token.
        work = sum(
            len(s.request.generation.prompt_token_ids) + s.request.max_tokens + 2
            for s in self.live.values()
        )
        work += len(request.generation.prompt_token_ids) + request.max_tokens + 2
        limit = None
        if self.promises.plans_per_token is not None:
            limit = work * self.config.max_in_flight * self.promises.plans_per_token
            limit += self.num_plans
        shadow = Shadow(request, self.num_arrivals, reference, stops, limit)
        shadow.num_older = len(self.live)
        self.num_arrivals += 1
        self.live[request.request_id] = shadow

    def finished(self, request_id: str, reason: FinishReason) -> None:
        """The request left by `finish`, not by a commit."""
        self._leave(self.live[request_id], reason)
        self._check_pages()

    def planned(self, plan: StepPlan | None) -> None:
        if plan is None:
            self._check_idle()
            return
        self.num_plans += 1
        require(len(self.in_flight) < self.config.max_in_flight, "S8", "too many plans in flight")
        self._check_stall_free(plan)
        self._apply_preemptions(plan)
        self._check_admissions(plan)
        shadows = [self._apply_chunk(plan, chunk) for chunk in plan.chunks]
        self.in_flight.append((plan, shadows))
        self._check_budget(plan)
        self._check_fcfs(plan)
        self._check_fill(plan)
        self._check_pages()
        if plan.slot_loads and self.promises.keeps_watermark:
            require(
                self.scheduler.pages.num_available >= self.config.num_watermark_pages,
                "watermark",
                "an admission went below it",
            )

    def committed(self, plan: StepPlan, updates: list[TokenUpdate]) -> None:
        expected, shadows = self.in_flight.pop(0)
        require(expected == plan, "S6", "plans are committed in order")
        by_id = {update.request.request_id: update for update in updates}
        require(len(by_id) == len(updates), "S6", "two updates for one request")
        for chunk, shadow in zip(plan.chunks, shadows, strict=True):
            shadow.num_in_flight -= 1
            shadow.num_pending -= chunk.samples
            if shadow.finished is None:
                self._apply_update(shadow, chunk, by_id.pop(chunk.request_id, None))
            elif shadow.num_in_flight == 0:
                self._release(shadow)
        require(not by_id, "S6", f"updates without a chunk: {list(by_id)}")
        self._check_pages()

    def drained(self) -> None:
        """Nothing is left: every page is free or can be evicted."""
        require(not self.live and not self.draining, "S4", f"left over: {list(self.live)}")
        pages = self.scheduler.pages
        require(pages.num_available == pages.num_total, "S5", "pages are held by nobody")
        if not self.config.prefix_caching:
            require(pages.num_free == pages.num_total, "S5", "pages are cached without a cache")
        pages.release(pages.allocate(pages.num_total))
        require(pages.num_free == pages.num_total, "S5", "the prefix cache can't be evicted")

    # -- plans ---------------------------------------------------------------

    def _order(self, shadow: Shadow) -> tuple[int, int]:
        """Rank of a request: its class, then its arrival."""
        return shadow.request.generation.priority, shadow.index

    def _schedulable(self, shadow: Shadow) -> bool:
        if self.config.chain_decodes or shadow.num_in_flight == 0:
            return True
        return self.config.stream_chunks and 0 <= shadow.num_computed < shadow.num_prefill

    def _decode_ready(self) -> list[Shadow]:
        return [
            shadow
            for shadow in self.live.values()
            if shadow.slot is not None
            and shadow.num_computed >= shadow.num_prefill
            and shadow.num_output_planned < shadow.request.max_tokens
            and self._schedulable(shadow)
        ]

    def _check_idle(self) -> None:
        """No plan: either the pipe is full, or decodes wait for pages, or nothing can go."""
        if len(self.in_flight) >= self.config.max_in_flight:
            return
        if not self.in_flight:
            require(not self.live, "S4", f"stuck with {list(self.live)}")
        ready = self._decode_ready()
        if ready and (self.promises.stall_free or not self.in_flight):
            size = self.config.page_size
            num_needed = sum(s.num_computed == len(s.pages) * size for s in ready)
            short = num_needed > self.scheduler.pages.num_available
            require(short and bool(self.in_flight), "S1", "ready decodes were not planned")
            return
        waits = [s for s in self.live.values() if self._has_prefill(s) and self._schedulable(s)]
        require(not waits or not self.promises.fills, "S2", "a partial prefill was not planned")

    def _check_stall_free(self, plan: StepPlan) -> None:
        decodes = {chunk.request_id: chunk for chunk in plan.decodes}
        if plan.prefills and not self.promises.decodes_beside_prefills:
            unscored = [c for c in plan.prefills if not self._is_scored(c.request_id)]
            require(not (unscored and decodes), "S1", "a prompt beside decodes")
        for shadow in self._decode_ready() if self.promises.stall_free else ():
            limit = self.config.max_seqs_per_step
            if limit is not None and (len(plan.chunks) == limit or plan.preempted):
                break  # The others go into the next micro-batch.
            request_id = shadow.request.request_id
            if request_id not in plan.preempted:
                require(request_id in decodes, "S1", f"{request_id} is ready but does not decode")
                require(decodes[request_id].num_tokens == 1, "S1", "a decode is one token")
        if plan.preempted:
            require(not plan.slot_loads, "S1", "a plan preempts and admits")

    def _apply_preemptions(self, plan: StepPlan) -> None:
        require(self.promises.preempts or not plan.preempted, "S4", "preempts in spite of reserves")
        for request_id in plan.preempted:
            shadow = self.live[request_id]
            running = [s for s in self.live.values() if s.slot is not None]
            if self.promises.admits_in_order:
                running.sort(key=self._order)
            else:
                running.sort(key=lambda s: (s.request.generation.priority, s.num_admission))
            require(shadow.num_in_flight == 0, "S8", f"victim {request_id} is in flight")
            require(shadow is running[-1], "S4", f"victim {request_id} is not the youngest")
            require(shadow is not running[0], "S4", "the oldest was preempted")
            if self.promises.has_headroom:
                require(
                    shadow.num_preemptions == 0 or shadow.has_token_since_resume,
                    "S4",
                    f"{request_id} was preempted twice without a token between",
                )
                require(shadow.num_preemptions <= shadow.num_older, "S4", "preempted too often")
            shadow.num_preemptions += 1
            shadow.has_token_since_resume = False
            self._release(shadow)

    def _check_admissions(self, plan: StepPlan) -> None:
        used = {s.slot for s in [*self.live.values(), *self.draining] if s.slot is not None}
        for load in plan.slot_loads:
            waiting = [s for s in self.live.values() if s.slot is None]
            require(load.request_id in self.live, "S3", f"{load.request_id} is not live")
            shadow = self.live[load.request_id]
            is_next = bool(waiting) and shadow is min(waiting, key=self._order)
            require(
                is_next or not self.promises.admits_in_order,
                "S3",
                f"{load.request_id} jumps the queue",
            )
            require(load.slot not in used, "S5", f"slot {load.slot} is in use")
            require(list(load.output_token_ids) == shadow.output, "S7", "outputs changed")
            require(
                load.prompt_token_ids == shadow.request.generation.prompt_token_ids,
                "S7",
                "prompt changed",
            )
            used.add(load.slot)
            shadow.slot = load.slot
            self.num_admissions += 1
            shadow.num_admission = self.num_admissions
            shadow.num_prefill = shadow.num_known
            shadow.num_computed = -1

    def _apply_chunk(self, plan: StepPlan, chunk: Chunk) -> Shadow:
        request_id = chunk.request_id
        require(request_id in self.live, "S6", f"{request_id} is not live")
        shadow = self.live[request_id]
        require(shadow.slot == chunk.slot, "S6", f"{request_id} has no such slot")
        require(self._schedulable(shadow), "S8", f"{request_id} is in two plans")
        if shadow.num_computed < 0:
            self._check_first_chunk(shadow, chunk)
        require(
            chunk.start == shadow.num_computed,
            "S6",
            f"{request_id} starts at {chunk.start}, not {shadow.num_computed}",
        )
        shadow.pages.extend(chunk.new_pages)
        for page in chunk.new_pages:
            self.salt_of_page[page] = shadow.request.generation.cache_salt
        end = chunk.start + chunk.num_tokens
        if chunk.is_decode:
            require(chunk.start >= shadow.num_prefill, "S6", "a decode before the prefill's end")
            require(chunk.samples and chunk in plan.decodes, "S6", "decodes sample")
        else:
            require(end <= shadow.num_prefill, "S6", "a chunk beyond the known tokens")
            require(len(chunk.token_ids) == chunk.num_tokens > 0, "S6", "ids of a chunk")
            require(
                chunk.samples == (end == shadow.num_prefill),
                "S6",
                f"{request_id} samples={chunk.samples} at {end} of {shadow.num_prefill}",
            )
            is_whole = chunk.samples or self._is_scored(request_id)
            require(is_whole or not self.promises.whole_prompts, "whole", f"{request_id} is cut")
        shadow.num_computed = end
        shadow.num_pending += chunk.samples
        shadow.num_in_flight += 1
        require(shadow.num_output_planned <= shadow.request.max_tokens, "S7", "beyond max_tokens")
        return shadow

    def _is_scored(self, request_id: str) -> bool:
        return self.live[request_id].request.sampling.prompt_logprobs is not None

    def _check_first_chunk(self, shadow: Shadow, chunk: Chunk) -> None:
        size = self.config.page_size
        require(0 <= chunk.start < shadow.num_prefill, "S6", "at least one token is computed")
        require(chunk.start % size == 0, "S6", "only full pages come from the prefix cache")
        if not self.config.prefix_caching:
            require(chunk.start == 0, "S6", "skips tokens without a prefix cache")
        shadow.num_computed = chunk.start
        salt = shadow.request.generation.cache_salt
        for page in chunk.new_pages[: chunk.start // size]:
            require(self.salt_of_page[page] == salt, "salt", f"page {page} is another tenant's")

    def _check_budget(self, plan: StepPlan) -> None:
        rows, sample_rows = plan.num_tokens, plan.num_sample_rows
        num_rows = self.config.token_budget
        if self.promises.whole_prompts:
            num_rows = max(self.config.max_model_len - 1, self.config.max_num_seqs)
            if self.promises.decodes_beside_prefills:
                num_rows = self.config.max_model_len + self.config.max_num_seqs - 2
        require(rows <= num_rows, "S2", f"{rows} rows are over the budget")
        limit = self.config.max_seqs_per_step
        require(limit is None or len(plan.chunks) <= limit, "S2", "too many sequences in a step")
        fitting = [bucket for bucket in self.config.buckets if bucket >= rows]
        require(plan.num_rows_bucket == fitting[0], "S2", "not the smallest bucket that fits")
        limit = self.config.max_sample_rows(plan.num_rows_bucket)
        require(sample_rows <= limit, "S2", f"{sample_rows} sample rows are over {limit}")

    def _has_prefill(self, shadow: Shadow) -> bool:
        return shadow.slot is not None and shadow.num_computed < shadow.num_prefill

    def _check_fcfs(self, plan: StepPlan) -> None:
        if not self.promises.prefills_in_order:
            return
        younger_has_prefill, priority = False, None
        prefills = {chunk.request_id for chunk in plan.prefills}
        for shadow in sorted(self.live.values(), key=self._order, reverse=True):
            request_id = shadow.request.request_id
            if shadow.request.generation.priority != priority:
                younger_has_prefill, priority = False, shadow.request.generation.priority
            blocked = self._has_prefill(shadow) and (
                request_id in prefills or self._schedulable(shadow)
            )
            require(
                not (younger_has_prefill and blocked), "S3", f"a younger one overtakes {request_id}"
            )
            younger_has_prefill |= request_id in prefills

    def _check_fill(self, plan: StepPlan) -> None:
        """The budget is used up if any prefill token waits while memory is free."""
        if plan.preempted or plan.num_tokens == self.config.token_budget:
            return
        if not self.promises.fills or len(plan.chunks) == self.config.max_seqs_per_step:
            return
        scores = any(
            s.request.sampling.prompt_logprobs is not None
            for s in self.live.values()
            if s.slot is not None or s is self._queue_head()
        )
        if scores or plan.num_sample_rows == self.config.max_num_seqs:
            return
        prefills = {chunk.request_id for chunk in plan.prefills}
        for shadow in self.live.values():
            waits = self._has_prefill(shadow) and (
                self._schedulable(shadow) or shadow.request.request_id in prefills
            )
            require(not waits, "S2", f"{shadow.request.request_id} waits beside unused rows")
        head = self._queue_head()
        if head is None or head.num_preemptions:
            return
        num_slots = sum(s.slot is not None for s in [*self.live.values(), *self.draining])
        num_pages = -(-head.num_known // self.config.page_size)
        free = self.scheduler.pages.num_available - num_pages >= self.config.num_watermark_pages
        require(
            not (free and num_slots < self.config.max_num_seqs),
            "S2",
            f"{head.request.request_id} could have been admitted",
        )

    def _queue_head(self) -> Shadow | None:
        return next((s for s in self.live.values() if s.slot is None), None)

    # -- commits -------------------------------------------------------------

    def _apply_update(self, shadow: Shadow, chunk: Chunk, update: TokenUpdate | None) -> None:
        sampling = shadow.request.sampling
        expects = bool(chunk.samples or chunk.logprob_targets)
        require((update is not None) == expects, "S6", "an update for each result, and no more")
        if update is None:
            return
        for entry in update.prompt_logprobs:
            require(len(entry.top) == sampling.prompt_logprobs, "logprobs", "top count")
            shadow.prompt_logprobs.append((entry.token_id, entry.logprob))
        require(len(update.token_ids) == chunk.samples, "S6", "one token a sampling chunk")
        num_logprobs = len(update.token_ids) if sampling.logprobs is not None else 0
        require(len(update.logprobs) == num_logprobs, "logprobs", "one entry a token")
        if not update.token_ids:
            require(update.finish_reason is None, "S7", "finished without a token")
            return
        shadow.output.extend(update.token_ids)
        self._check_token(shadow, update)

    def _check_token(self, shadow: Shadow, update: TokenUpdate) -> None:
        request_id = shadow.request.request_id
        num_output = len(shadow.output)
        shadow.has_token_since_resume = True
        require(shadow.output == shadow.reference[:num_output], "S7", f"{request_id} differs")
        in_order = self.promises.prefills_in_order and self.config.chain_decodes
        if num_output == 1 and in_order and not self.scheduler.num_preemptions:
            late = [
                s
                for s in self.live.values()
                if s.index < shadow.index
                and s.request.generation.priority == shadow.request.generation.priority
                and not s.output
            ]
            require(not late, "S3", f"{request_id} has its first token before an older one")
        ends = num_output == len(shadow.reference)
        reason = None
        if ends:
            reason = FinishReason.STOP if shadow.stops else FinishReason.LENGTH
        require(update.finish_reason == reason, "S7", f"{request_id}: {update.finish_reason}")
        stop_id = shadow.output[-1] if reason is FinishReason.STOP else None
        require(update.stop_token_id == stop_id, "S7", f"stop id {update.stop_token_id}")
        if reason is not None:
            self._check_prompt_logprobs(shadow)
            self._leave(shadow, reason)

    def _check_prompt_logprobs(self, shadow: Shadow) -> None:
        expected: list[tuple[int, float]] = []
        if shadow.request.sampling.prompt_logprobs is not None:
            expected = reference_prompt_logprobs(shadow.request.generation.prompt_token_ids)
        got = [(token_id, round(value, 2)) for token_id, value in shadow.prompt_logprobs]
        require(got == expected, "logprobs", f"prompt logprobs of {shadow.request.request_id}")

    def _leave(self, shadow: Shadow, reason: FinishReason) -> None:
        require(
            shadow.plan_limit is None or self.num_plans <= shadow.plan_limit,
            "S4",
            "took more plans than its bound",
        )
        require(shadow.request.finish_reason is reason, "S7", "finish reason of the record")
        shadow.finished = reason
        self.num_finished += 1
        del self.live[shadow.request.request_id]
        if shadow.slot is None:
            return
        self.draining.append(shadow)
        if shadow.num_in_flight == 0:
            self._release(shadow)

    def _release(self, shadow: Shadow) -> None:
        shadow.slot = None
        shadow.pages = []
        shadow.num_computed = 0
        shadow.num_prefill = 0
        if shadow in self.draining:
            self.draining.remove(shadow)

    # -- pages ---------------------------------------------------------------

    def _check_pages(self) -> None:
        """S5 against tables that were rebuilt from the plans."""
        holders = [s for s in [*self.live.values(), *self.draining] if s.slot is not None]
        pages = self.scheduler.pages
        try:
            self.scheduler.check_integrity()
            pages.check_integrity(shadow.pages for shadow in holders)
        except RuntimeError as error:
            raise PropertyViolation("S5", str(error)) from error
        counts = Counter(page for shadow in holders for page in shadow.pages)
        shared = {page for page, count in counts.items() if count > 1}
        size = self.config.page_size
        for shadow in holders if shared else ():
            for index, page in enumerate(shadow.pages):
                if page in shared:
                    require(
                        (index + 1) * size <= shadow.num_computed, "S5", f"page {page} is not full"
                    )
