"""Drafts change when tokens come, never which: random traffic on a device whose text repeats."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.plan import TAKE_FROM_SLOT, StepPlan
from jaxserve.engine.request import FinishReason, GenerationRequest, Request
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.config import SchedulerConfig, SpeculationConfig
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.engine.scheduler.speculation import Speculation, can_speculate
from tests.scheduler.driver import Traffic, random_config, random_request
from tests.scheduler.fake_device import load_of
from tests.scheduler.repeating_device import RepeatingDevice, Text, whole_output

TRAFFIC = Traffic(max_prompt=12, max_output=36, prompt_logprobs_share=0.0)


class Run:
    """Requests through one scheduler and one device; every token is compared as it comes."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.scheduler = Scheduler(config)
        self.scheduler.pages.track_freed = True
        self.device = RepeatingDevice(page_size=config.page_size, depth=config.max_in_flight)
        self.live: dict[str, Request] = {}
        self.expected: dict[str, Text] = {}
        self.num_plans = 0
        self.last_plan: StepPlan | None = None

    def add(self, request: Request) -> None:
        self.scheduler.add(request)
        self.live[request.request_id] = request
        load = load_of(request)
        self.expected[request.request_id] = whole_output(load, request.max_tokens)

    def plan(self) -> bool:
        ready = [request.request_id for request in self.live.values() if self._must_decode(request)]
        plan = self.scheduler.plan(0.0)
        self.device.poison(self.scheduler.pages.drain_freed())
        if plan is None:
            assert not ready or self.device.num_in_flight, "S4: stuck"
            return False
        self.num_plans += 1
        self.last_plan = plan
        self._check(plan, ready)
        self.device.submit(plan)
        self.scheduler.check_integrity()
        return True

    def commit(self) -> None:
        if not self.device.num_in_flight:
            return
        for update in self.scheduler.commit(*self.device.next_completion(), 0.0):
            request = update.request
            expected = self.expected[request.request_id]
            output = tuple(request.output_token_ids)
            assert output == expected[: len(output)], f"S7: {request.request_id} differs"
            assert output[-len(update.token_ids) :] == update.token_ids
            num_logprobs = 0 if request.sampling.logprobs is None else len(update.token_ids)
            assert [entry.token_id for entry in update.logprobs] == list(
                update.token_ids[:num_logprobs]
            )
            assert (update.finish_reason is not None) == (output == expected), "S7: ends"
            if update.finish_reason is not None:
                del self.live[request.request_id]
        self.scheduler.check_integrity()

    def abort(self, request_id: str) -> None:
        self.scheduler.finish(request_id, FinishReason.CANCELLED)
        del self.live[request_id]

    def lose_steps(self) -> None:
        """The device had no memory for a step."""
        self.scheduler.lose_steps()
        self.device.restart()

    def drain(self) -> None:
        while self.scheduler.has_work:
            if not self.plan():
                self.commit()
        pages = self.scheduler.pages
        assert pages.num_available == pages.num_total, "S5: pages are held by nobody"

    def _must_decode(self, request: Request) -> bool:
        is_known = request.slot is not None and not request.num_in_flight_steps
        return is_known and request.num_computed_tokens >= request.num_prefill_tokens

    def _check(self, plan: StepPlan, ready: list[str]) -> None:
        config = self.scheduler.config
        assert plan.num_tokens <= config.token_budget, "S2: over the budget"
        fitting = [bucket for bucket in config.buckets if bucket >= plan.num_tokens]
        assert plan.num_rows_bucket == fitting[0]
        assert plan.num_sample_rows <= config.max_sample_rows(fitting[0])
        for chunk in plan.chunks:
            request = self.live[chunk.request_id]
            end = request.num_prompt_tokens + request.max_tokens - 1
            assert chunk.start + chunk.num_tokens <= end, "S7: beyond max_tokens"
        planned = {chunk.request_id for chunk in plan.chunks}
        if config.max_seqs_per_step is None:
            assert set(ready) <= planned | set(plan.preempted), "S1: a ready decode is left out"
        assert not (plan.preempted and plan.slot_loads), "S1: preempts and admits"


def random_run(seed: int, **fixed: object) -> Run:
    rng = random.Random(seed)
    speculation = SpeculationConfig(
        num_tokens=rng.choice((1, 2, 4, 7)),
        lookup_max=rng.choice((2, 4)),
        lookup_min=rng.choice((1, 2)),
        may_grow_step=rng.random() < 0.7,
    )
    run = Run(random_config(rng, speculation=speculation, **fixed))
    abort_rate = rng.choice((0.0, 0.03))
    for index in range(12):
        run.add(random_request(rng, f"r{index}", run.scheduler.config, TRAFFIC))
        for _ in range(rng.choice((0, 1, 4, 12))):
            if not run.plan() or rng.random() < 0.4:
                run.commit()
            if run.live and rng.random() < abort_rate:
                run.abort(rng.choice(list(run.live)))
            if rng.random() < 0.02:
                run.lose_steps()
    run.drain()
    return run


@pytest.mark.parametrize(("max_in_flight", "chain_decodes"), [(1, True), (2, True), (3, False)])
def test_tokens_are_those_without_drafts(max_in_flight: int, chain_decodes: bool) -> None:
    """S1, S2, S4, S5 and S7, with preemptions, aborts and shared pages."""
    runs = []

    @settings(max_examples=9, deadline=None, derandomize=True)
    @given(seed=st.integers(0, 2**32 - 1))
    def check(seed: int) -> None:
        runs.append(random_run(seed, max_in_flight=max_in_flight, chain_decodes=chain_decodes))

    check()
    schedulers = [run.scheduler for run in runs]
    num_drafted = sum(scheduler.num_draft_tokens for scheduler in schedulers)
    num_accepted = sum(scheduler.num_accepted_tokens for scheduler in schedulers)
    assert 0 < num_accepted < num_drafted
    assert sum(scheduler.num_preemptions for scheduler in schedulers) > 20
    assert sum(scheduler.prefix_cache_hits for scheduler in schedulers) > 0


CONFIG = SchedulerConfig(
    num_pages=40,
    max_model_len=120,
    max_num_seqs=3,
    token_budget=24,
    buckets=(4, 8, 24),
    page_size=4,
    watermark=0.0,
)


def make_request(name: str, prompt: tuple[int, ...], seed: int, max_tokens: int) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens)
    generation = GenerationRequest(name, prompt, sampling)
    return Request(generation, max_tokens, seed, frozenset(), arrival_s=0.0)


def test_text_that_repeats_takes_fewer_steps() -> None:
    num_plans = []
    for speculation in (None, SpeculationConfig()):
        run = Run(replace(CONFIG, speculation=speculation))
        run.add(make_request("r", tuple(range(20)), seed=8, max_tokens=100))
        run.drain()
        num_plans.append(run.num_plans)
    assert num_plans[1] < 0.6 * num_plans[0]


def test_a_waiting_prompt_gets_its_rows_beside_drafts() -> None:
    run = Run(replace(CONFIG, token_budget=4, buckets=(4,), speculation=SpeculationConfig()))
    run.add(make_request("quotes", (1, 2, 3, 4), seed=0, max_tokens=100))
    for _ in range(20):
        run.plan()
        run.commit()
    assert run.scheduler.num_accepted_tokens > 0
    late = make_request("late", tuple(range(12)), seed=1, max_tokens=1)
    run.add(late)
    while late.finish_reason is None:
        if run.plan():
            assert run.last_plan is not None
            names = {chunk.request_id for chunk in run.last_plan.chunks}
            assert "late" in names or late.num_computed_tokens == 12
        run.commit()
    assert "quotes" in run.live


def test_steps_may_be_lost_at_every_moment() -> None:
    for moment in range(60):
        run = Run(replace(CONFIG, speculation=SpeculationConfig()))
        run.add(make_request("r", (1, 2, 3, 4), seed=1, max_tokens=60))
        for _ in range(moment):
            if not run.plan():
                run.commit()
        run.lose_steps()
        run.drain()


def test_the_longest_and_latest_match_is_taken() -> None:
    text = (7, 1, 2, 3, 30, 9, 1, 2, 3, 31, 8, 7, 1, 2, 3)
    for lookup_max, token_id in ((3, 31), (4, 30)):
        config = SpeculationConfig(lookup_max=lookup_max)
        request = make_request("r", text, seed=0, max_tokens=9)
        request.num_computed_tokens = len(text) - 1
        rows = Speculation(config, request).next_rows(request, max_drafts=1)
        assert rows == (TAKE_FROM_SLOT, token_id)


def test_penalised_requests_are_not_guessed() -> None:
    request = make_request("r", (1, 2, 1, 2), seed=0, max_tokens=9)
    assert can_speculate(request)
    penalised = replace(request.sampling, repetition_penalty=1.1)
    request.generation = replace(request.generation, sampling=penalised)
    assert not can_speculate(request)
