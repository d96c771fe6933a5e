"""Random traffic for the scheduler on a fake device, checked at every step."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

from jaxserve.engine.request import FinishReason, GenerationRequest, Request, ServiceObjective
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.budget import StepBudget
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.scheduler import Scheduler
from tests.scheduler.fake_device import VOCAB_SIZE, FakeDevice
from tests.scheduler.properties import WHOLE_PROMPT_POLICIES, PropertyMonitor


@dataclass(frozen=True, slots=True)
class Traffic:
    """Chances per iteration and sizes of what arrives."""

    arrival_rate: float = 0.5
    abort_rate: float = 0.05
    max_prompt: int = 24
    max_output: int = 16
    max_live: int = 24
    prompt_logprobs_share: float = 0.1
    shared_prefix_share: float = 0.5
    num_classes: int = 1
    """Priorities are drawn below this; more than one only for a random order."""
    copy_share: float = 0.2
    """Requests with the prompt of the one before, often still unfinished."""


@dataclass(frozen=True, slots=True)
class RunStats:
    num_steps: int
    num_finished: int
    num_preemptions: int
    num_cached_tokens: int


def random_config(rng: random.Random, **fixed: object) -> SchedulerConfig:
    """A small configuration; every page count from the least that is allowed."""
    page_size = rng.choice((1, 2, 4, 8))
    max_model_len = rng.randrange(24, 49)
    max_num_seqs = rng.randrange(1, 9)
    token_budget = max_num_seqs + rng.choice((0, 1, 3, 8, 24))
    edges = {token_budget + rng.choice((0, 0, 5)), max_num_seqs, rng.randrange(1, token_budget + 1)}
    watermark = rng.choice((0.0, 0.0, 0.01, 0.1))
    longest = -(-max_model_len // page_size)
    num_pages = longest + rng.choice((0, 0, 1, 2, longest // 2, 4 * longest))
    num_pages = -int(-num_pages // (1 - watermark)) + 1 if watermark else num_pages
    values: dict[str, object] = {
        "num_pages": num_pages,
        "max_model_len": max_model_len,
        "max_num_seqs": max_num_seqs,
        "token_budget": token_budget,
        "buckets": tuple(sorted(edges)),
        "page_size": page_size,
        "watermark": watermark,
        "max_in_flight": rng.choice((1, 2, 2, 4)),
        "chain_decodes": rng.random() < 0.6,
        "prefix_caching": rng.random() < 0.6,
    }
    if fixed.get("policy") in WHOLE_PROMPT_POLICIES:
        values["buckets"] = tuple(sorted({*edges, max_model_len + max_num_seqs}))
    return SchedulerConfig(**{**values, **fixed})  # type: ignore[arg-type]


def random_request(
    rng: random.Random, name: str, config: SchedulerConfig, traffic: Traffic
) -> Request:
    longest = min(traffic.max_prompt, config.max_model_len - 1)
    prompt = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, longest + 1))]
    if rng.random() < traffic.shared_prefix_share:
        # A few prompts that many requests begin with, so that pages are shared.
        base = random.Random(rng.randrange(3))
        shared = [base.randrange(VOCAB_SIZE) for _ in range(longest)]
        prompt = (shared[: rng.randrange(1, longest + 1)] + prompt)[:longest]
    room = min(traffic.max_output, config.max_model_len - len(prompt))
    max_tokens = rng.randrange(1, room + 1)
    sampling = SamplingParams(
        temperature=rng.choice((0.0, 1.0)),
        max_tokens=max_tokens,
        min_tokens=rng.randrange(max_tokens + 1) if rng.random() < 0.3 else 0,
        logprobs=rng.randrange(4) if rng.random() < 0.2 else None,
        prompt_logprobs=rng.randrange(4) if rng.random() < traffic.prompt_logprobs_share else None,
    )
    stop_ids = [rng.randrange(VOCAB_SIZE) for _ in range(rng.choice((0, 0, 1, 4)))]
    salt = rng.choice(("", "", "tenant"))
    return Request(
        generation=GenerationRequest(
            name, tuple(prompt), sampling, cache_salt=salt, **_random_service(rng, traffic)
        ),
        max_tokens=max_tokens,
        seed=rng.randrange(2**64),
        stop_token_ids=frozenset(stop_ids),
        arrival_s=0.0,
    )


def _random_service(rng: random.Random, traffic: Traffic) -> dict[str, Any]:
    if traffic.num_classes == 1:
        return {}
    objective = ServiceObjective(rng.uniform(0.0, 60.0), rng.uniform(0.1, 4.0))
    return {
        "priority": rng.randrange(traffic.num_classes),
        "objective": rng.choice((None, objective)),
    }


class Run:
    """One scheduler, one device, one stream of random events.

    Time goes on by a second with each plan or commit.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        seed: int,
        traffic: Traffic,
        budget: StepBudget | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.config = config
        self.traffic = traffic
        self.now_s = 0.0
        self.scheduler = Scheduler(config, budget=budget)
        self.scheduler.pages.track_freed = True
        self.device = FakeDevice(page_size=config.page_size, depth=config.max_in_flight)
        self.monitor = PropertyMonitor(
            self.scheduler, has_classes=traffic.num_classes > 1, fixed_size=budget is None
        )

    def steps(self, num_steps: int) -> RunStats:
        """Random events for `num_steps` plans, then everything is drained."""
        while self.monitor.num_plans < num_steps:
            self._arrive()
            self._abort()
            # Now and then results come in before the pipe is full.
            if not self.plan() or self.rng.random() < 0.3:
                self.commit()
        while self.scheduler.has_work:
            if not self.plan():
                self.commit()
            if self.rng.random() < 0.1:
                self._abort()
        self.monitor.drained()
        return RunStats(
            num_steps=self.monitor.num_plans,
            num_finished=self.monitor.num_finished,
            num_preemptions=self.scheduler.num_preemptions,
            num_cached_tokens=self.scheduler.prefix_cache_hits,
        )

    def add(self, request: Request) -> None:
        request.arrival_s = self.now_s
        self.scheduler.add(request)
        self.monitor.arrived(request)

    def plan(self) -> bool:
        self.now_s += 1.0
        plan = self.scheduler.plan(self.now_s)
        self.monitor.planned(plan)
        self.device.poison(self.scheduler.pages.drain_freed())
        if plan is None:
            return False
        self.device.submit(plan)
        return True

    def commit(self) -> None:
        if self.device.num_in_flight:
            plan, results = self.device.next_completion()
            self.now_s += 1.0
            self.monitor.committed(plan, list(self.scheduler.commit(plan, results, self.now_s)))

    def finish(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> None:
        self.scheduler.finish(request_id, reason)
        self.monitor.finished(request_id, reason)

    def _arrive(self) -> None:
        room = self.traffic.max_live - len(self.monitor.live)
        if not self.monitor.live or self.rng.random() < self.traffic.arrival_rate:
            for _ in range(min(room, self.rng.choice((1, 1, 2, 5)))):
                request = self._random_request(f"r{self.monitor.num_arrivals}")
                self.add(request)

    def _random_request(self, name: str) -> Request:
        request = random_request(self.rng, name, self.config, self.traffic)
        if self.monitor.live and self.rng.random() < self.traffic.copy_share:
            last = next(reversed(self.monitor.live.values())).request
            request.generation = replace(last.generation, request_id=name)
            request.max_tokens = last.max_tokens
        return request

    def _abort(self) -> None:
        if self.monitor.live and self.rng.random() < self.traffic.abort_rate:
            self.finish(self.rng.choice(list(self.monitor.live)))


def random_run(seed: int, num_steps: int, *, num_classes: int = 1, **fixed: object) -> RunStats:
    """A random configuration and traffic; raises at the first violation."""
    rng = random.Random(seed)
    config = random_config(rng, **fixed)
    traffic = Traffic(
        max_prompt=rng.choice((6, 16, 40)),
        arrival_rate=rng.choice((0.1, 0.3, 1.0)),
        abort_rate=rng.choice((0.0, 0.02, 0.1)),
        max_live=rng.choice((4, 12, 24)),
        max_output=rng.choice((4, 16, 40, 40)),
        num_classes=num_classes,
    )
    return Run(config, rng.randrange(2**32), traffic).steps(num_steps)
