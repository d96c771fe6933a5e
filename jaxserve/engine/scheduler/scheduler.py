"""Scheduler: requests in, step plans out, results back in.

Pure Python; reads no clock and imports no jax, so that a simulator drives
the very same code. `num_computed_tokens` is advanced when a step is planned,
which lets the next step be planned before the results of the last are known.

Who decides what: the policy the order, the budget the size, `StepDraft` what
is allowed, this class what happens when results come back. There is one way
out for a request (`finish`, which `commit` uses too) and one place that
releases pages and slots (`SchedulerState.release`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from jaxserve.engine.pages import PagePool
from jaxserve.engine.plan import NO_TOKEN, Chunk, StepPlan, StepResults
from jaxserve.engine.request import (
    FinishReason,
    Request,
    TokenLogprobs,
    TokenUpdate,
)
from jaxserve.engine.scheduler.admission import register_pages
from jaxserve.engine.scheduler.budget import StepBudget, TokenBudget
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.draft import StepDraft
from jaxserve.engine.scheduler.policies import Policy, make_policy
from jaxserve.engine.scheduler.speculation import Speculation, can_speculate
from jaxserve.engine.scheduler.state import SchedulerState
from jaxserve.engine.scheduler.updates import (
    ResultReader,
    StepUpdates,
    finish_reason_after,
    joined_updates,
    num_plain_outputs,
    only_fills_page,
    read_prompt_logprobs,
)
from jaxserve.errors import ConfigError, InvalidRequest


class _InFlight(NamedTuple):
    plan: StepPlan
    decoding: list[Request]
    """Owners of the plan's decodes, as `prefilling` of its prefills. Kept here rather than
    looked up by id, since an id may be used again while a finished request still is in flight."""
    prefilling: list[Request]
    num_sample_rows: int
    planned_s: float


class Scheduler:
    """Plans steps for one executor. Not thread-safe: one thread calls it.

    Args:
        config: limits; validated by itself.
        policy: the order. By default the one that `config.policy` names.
        budget: the size of steps. By default `config.token_budget` rows each;
            another one may give fewer, never more. Policies that put whole
            prompts into a step have no use for one.

    Raises ConfigError if the policy needs larger steps than the buckets hold,
    or can't follow the budget.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        policy: Policy | None = None,
        budget: StepBudget | None = None,
    ) -> None:
        self.config = config
        self._page_size = config.page_size
        self.policy = policy or make_policy(config.policy)
        self._rules = self.policy.rules
        self._max_step_rows = self.policy.check(config)
        if budget is not None and not self._rules.sizes_chunks:
            raise ConfigError(
                f"--policy {self.policy.name} has no use for a time budget: it does not cut "
                "prompts to fit a step beside its decodes"
            )
        self._budget = budget or TokenBudget(config.token_budget)
        self._last_commit_s = 0.0
        self._state = SchedulerState.empty(config, self.policy.queue_key)
        self._in_flight: deque[_InFlight] = deque()
        self._next_step_id = 0

    @property
    def pages(self) -> PagePool:
        return self._state.pages

    @property
    def has_work(self) -> bool:
        """Something runs, waits or is in flight."""
        return bool(self._state.running or self._state.waiting or self._in_flight)

    @property
    def num_running(self) -> int:
        return len(self._state.running)

    @property
    def num_waiting(self) -> int:
        return len(self._state.waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Prompt tokens of the requests that wait."""
        return self._state.waiting.num_tokens

    @property
    def num_in_flight(self) -> int:
        """Steps planned but not committed."""
        return len(self._in_flight)

    @property
    def num_preemptions(self) -> int:
        return self._state.num_preemptions

    @property
    def num_drafts(self) -> int:
        """Drafts that were checked."""
        return self._state.num_drafts

    @property
    def num_draft_tokens(self) -> int:
        """Of the drafts that were checked."""
        return self._state.num_draft_tokens

    @property
    def num_accepted_tokens(self) -> int:
        """Those of `num_draft_tokens` that came out."""
        return self._state.num_accepted_tokens

    @property
    def prefix_cache_queries(self) -> int:
        """Tokens looked up in the prefix cache at first admissions."""
        return self._state.prefix_cache_queries

    @property
    def prefix_cache_hits(self) -> int:
        """Tokens of `prefix_cache_queries` that were found."""
        return self._state.prefix_cache_hits

    def add(self, request: Request) -> None:
        """Queues a new request.

        Raises QueueFull naming the limit, or InvalidRequest if the id is in
        use or the request can never fit: both leave everything as it was.
        """
        state, num_prompt = self._state, request.num_prompt_tokens
        if request.request_id in state.running or request.request_id in state.waiting:
            raise InvalidRequest("request_id", f"{request.request_id!r} is in use")
        longest = self.config.max_model_len
        if num_prompt < 1 or request.max_tokens < 1 or num_prompt + request.max_tokens > longest:
            raise InvalidRequest(
                "max_tokens",
                f"a prompt of {num_prompt} tokens and {request.max_tokens} tokens of output don't "
                f"fit --max-model-len {longest}; both must be at least 1",
            )
        state.waiting.append(request)
        if self.config.speculation is not None and can_speculate(request):
            request.speculation = Speculation(self.config.speculation, request)

    def plan(self, now_s: float) -> StepPlan | None:
        """The next step, to be submitted before `plan` is called again.

        None: nothing can be planned until a commit, an arrival or an abort.
        """
        if len(self._in_flight) >= self.config.max_in_flight:
            return None
        draft = StepDraft(
            self._state,
            rules=self._rules,
            budget=self._budget,
            max_rows=self._max_rows(),
            in_flight=[step.plan for step in self._in_flight],
            oldest_started_s=self._oldest_started_s(),
            now_s=now_s,
        )
        self.policy.fill(draft)
        plan = draft.finish(self._next_step_id)
        if plan is not None:
            self._next_step_id += 1
            self._in_flight.append(
                _InFlight(
                    plan,
                    draft.decode_requests,
                    draft.prefill_requests,
                    draft.num_sample_rows,
                    now_s,
                )
            )
        return plan

    def commit(self, plan: StepPlan, results: StepResults, now_s: float) -> StepUpdates:
        """Takes in the results of the oldest step in flight.

        Raises ValueError if `plan` or `results` is not the oldest step's.
        """
        if not self._in_flight or self._in_flight[0].plan.step_id != plan.step_id:
            raise ValueError(f"step {plan.step_id} is not the oldest in flight")
        _, decoding, prefilling, num_sample_rows, _ = self._in_flight[0]
        if results.step_id != plan.step_id or len(results.token_ids) != num_sample_rows:
            raise ValueError(f"results of step {results.step_id} don't fit plan {plan.step_id}")
        step_s = now_s - self._oldest_started_s()
        self._last_commit_s = now_s
        self._in_flight.popleft()
        reader = ResultReader(results)
        special = self._commit_decodes(decoding, plan.decodes.positions, reader, now_s)
        prefilled, row = [], len(decoding)
        for request, chunk in zip(prefilling, plan.prefills, strict=True):
            if self._takes_result(request):
                commit = self._commit_check if chunk.num_drafts else self._commit_chunk
                update = commit(request, chunk, reader, row, now_s)
                if update is not None:
                    prefilled.append(update)
            row += chunk.num_sample_rows
        self.policy.committed(plan, step_s)
        return StepUpdates(decoding, reader.token_ids, special, prefilled)

    def finish(self, request_id: str, reason: FinishReason) -> Request | None:
        """Ends a request at any moment; the only way out.

        Its slot and pages are free at once, or when its last step in flight
        is committed. Returns the request, or None if it is not (or no longer)
        waiting or running, so calling twice does no harm.
        """
        request = self._state.waiting.remove(request_id)
        if request is None:
            request = self._state.running.get(request_id)
            if request is None:
                return None
            self._state.retire(request)
        request.finish_reason = reason
        request.num_plain_outputs = len(request.output_token_ids)
        return request

    def lose_steps(self) -> list[Request]:
        """The steps in flight are lost, and all keys and values with them.

        Requests that run are preempted, to be computed again, and the prefix cache is emptied.
        Returns those requests, in order of admission.
        """
        lost, self._in_flight = self._in_flight, deque()
        for step in lost:
            for request, chunk in zip(step.prefilling, step.plan.prefills, strict=True):
                request.num_prompt_logprobs -= len(chunk.logprob_targets)
        return self._state.lose_pages()

    def check_integrity(self) -> None:
        """Raises PageIntegrityError unless every page and slot is accounted for."""
        self._state.check_integrity()

    def _max_rows(self) -> int:
        """Rows that the next step may have."""
        if self._rules.whole_prompts:
            return self._max_step_rows
        return self._budget.max_rows()

    def _oldest_started_s(self) -> float:
        """When the oldest step in flight began: planned, and the one before it done."""
        if not self._in_flight:
            return self._last_commit_s
        return max(self._in_flight[0].planned_s, self._last_commit_s)

    def _takes_result(self, request: Request) -> bool:
        """Counts a step of `request` as returned; False if it has finished meanwhile, and then
        lets go of what it held for its steps in flight."""
        request.num_in_flight_steps -= 1
        if request.finish_reason is None:
            return True
        if not request.num_in_flight_steps:
            self._state.release(request)
        return False

    def _commit_decodes(
        self, requests: list[Request], positions: Sequence[int], reader: ResultReader, now_s: float
    ) -> dict[int, TokenUpdate | None]:
        """As `_commit_chunk` for each decode, and the updates of those rows that gave more than a
        token, or nothing. The usual case makes no call: it runs for every sequence in every step.
        """
        special: dict[int, TokenUpdate | None] = {}
        page_size = self._page_size
        for row, (request, token_id) in enumerate(zip(requests, reader.token_ids, strict=False)):
            output = request.output_token_ids
            if len(output) == request.num_plain_outputs or token_id in request.special_token_ids:
                end = positions[row] + 1
                if not only_fills_page(request, token_id, end, page_size):
                    special[row] = None
                    if self._takes_result(request):
                        special[row] = self._commit_token(request, end, reader, row, now_s)
                    continue
                register_pages(self._state, request, end)
                request.num_plain_outputs = min(len(output) + page_size, request.max_tokens - 1)
            request.num_in_flight_steps -= 1
            request.last_token_s = now_s
            output.append(token_id)
        return special

    def _commit_chunk(
        self, request: Request, chunk: Chunk, reader: ResultReader, row: int, now_s: float
    ) -> TokenUpdate | None:
        """What a prefill chunk, whose rows begin at `row`, gave."""
        targets = chunk.logprob_targets
        if NO_TOKEN in reader.token_ids[row : row + len(targets)]:
            return self._failed(request)
        prompt_logprobs: tuple[TokenLogprobs, ...] = ()
        if targets:
            prompt_logprobs = read_prompt_logprobs(reader, request, chunk, row)
        end = chunk.start + chunk.num_tokens
        if chunk.samples:
            row += len(targets)
            return self._commit_token(request, end, reader, row, now_s, prompt_logprobs)
        return TokenUpdate(request, (), (), prompt_logprobs, None) if targets else None

    def _commit_check(
        self, request: Request, chunk: Chunk, reader: ResultReader, row: int, now_s: float
    ) -> TokenUpdate | None:
        """What a chunk with drafts gave: the token of each row whose own token came out."""
        speculation, state = request.speculation, self._state
        assert speculation is not None
        if speculation.is_dropped():
            return None
        updates: list[TokenUpdate] = []
        drafts = (*chunk.token_ids[1:], None)
        for end, draft in enumerate(drafts, start=chunk.start + 1):
            updates.append(self._commit_token(request, end, reader, row + len(updates), now_s))
            if updates[-1].finish_reason is not None or updates[-1].token_ids != (draft,):
                break
        num_right = len(updates) - 1
        state.num_drafts += 1
        state.num_draft_tokens += chunk.num_drafts
        state.num_accepted_tokens += num_right
        if request.finish_reason is None:
            speculation.settle(request, chunk, num_right)
        return joined_updates(updates)

    def _commit_token(
        self,
        request: Request,
        end: int,
        reader: ResultReader,
        row: int,
        now_s: float,
        prompt_logprobs: tuple[TokenLogprobs, ...] = (),
    ) -> TokenUpdate:
        """The token that `row`, the last of a chunk up to position `end`, gave."""
        token_id = reader.token_ids[row]
        if token_id == NO_TOKEN:
            return self._failed(request)
        register_pages(self._state, request, end)
        request.output_token_ids.append(token_id)
        request.last_token_s = now_s
        num_top = request.sampling.logprobs
        logprobs = () if num_top is None else (reader.logprobs(row, num_top),)
        reason = finish_reason_after(request, token_id)
        if reason is None:
            request.num_plain_outputs = num_plain_outputs(request, self._page_size)
            if request.masks is not None:
                request.masks.push(token_id)
        else:
            self.finish(request.request_id, reason)
        stop_token_id = token_id if reason is FinishReason.STOP else None
        return TokenUpdate(request, (token_id,), logprobs, prompt_logprobs, reason, stop_token_id)

    def _failed(self, request: Request) -> TokenUpdate:
        # What it computed may be no numbers, and nobody else is to begin with that.
        self._state.pages.withdraw(request.page_ids)
        self.finish(request.request_id, FinishReason.ERROR)
        return TokenUpdate(request, (), (), (), FinishReason.ERROR)
