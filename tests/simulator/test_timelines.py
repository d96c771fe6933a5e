"""The golden timelines of every policy, drawn by the simulated and by the live engine.

`tests/scheduler` draws them from the scheduler alone; here the engine's loop
drives it, over a modelled device and over a compiled model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import jax
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.executor import Executor
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.loop import Committed, EngineLoop
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.plan import StepPlan, StepResults
from jaxserve.engine.request import Request
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.policies import POLICIES
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.engine.settings import resolve_settings
from jaxserve.engine.startup import build_executor
from jaxserve.simulator.clock import VirtualClock
from jaxserve.simulator.sim_executor import SimExecutor, SimStep, StageTimes
from jaxserve.simulator.stopwatch import Stopwatch
from jaxserve.simulator.trace_source import TraceSource
from models.loading import open_model
from tests.engine.tiny_model import make_tiny_model
from tests.scheduler.timelines import (
    NAMES,
    plan_cells,
    read_goldens,
    timeline_config,
    timeline_request,
)

PAGE_BYTES = 1024
"""L 2, page of 4 tokens, K and V, K 2, D 8, float32."""
ARRIVALS = read_goldens("arrivals_beside_decodes")
TWO_STAGES = read_goldens("two_stages")


def golden_cells(timeline: str) -> list[dict[str, str]]:
    """What each step of a golden holds: request -> "d", or "p" and its tokens."""
    steps = []
    for line in timeline.split("\n")[1:]:
        if not line[0].isdigit():
            break
        cells = [line[6 + 5 * i : 11 + 5 * i].strip() for i in range(len(NAMES))]
        steps.append(
            {
                name: cell
                for name, cell in zip(NAMES, cells, strict=True)
                if cell not in ("", "-", ".")
            }
        )
    return steps


def beside_decodes() -> list[Request]:
    """C and D arrive while A and B are in step 0, which ends after a second."""
    early = [timeline_request(name, 3, 5) for name in "AB"]
    return [*early, timeline_request("C", 14, 2, 0.5), timeline_request("D", 5, 2, 0.5)]


def serve(
    config: SchedulerConfig, executor: Executor, clock: VirtualClock, requests: Sequence[Request]
) -> None:
    # Of the executor the source reads `can_accept` and `next_completion_s` alone.
    source = TraceSource(requests, clock, cast(SimExecutor, executor))
    scheduler, stopwatch = Scheduler(config), Stopwatch()
    loop = EngineLoop(scheduler, executor, source, stopwatch, EngineMetrics(), clock)
    committed: Committed | None = None
    while len(stopwatch.finished) < len(requests):
        loop.wait_for_work()
        committed = loop.turn(committed)
    scheduler.check_integrity()


class OneSecondSteps:
    """A compiled model in virtual time, one step at once."""

    def __init__(self, executor: JaxExecutor, clock: VirtualClock) -> None:
        self.depth = executor.depth
        self.plans: list[StepPlan] = []
        self._executor = executor
        self._clock = clock

    @property
    def next_completion_s(self) -> float | None:
        return self._clock.now_s + 1.0 if self._executor.num_in_flight else None

    def can_accept(self) -> bool:
        return self._executor.can_accept()

    def submit(self, plan: StepPlan) -> None:
        self.plans.append(plan)
        self._executor.submit(plan)

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        plan, results = self._executor.next_completion()
        self._clock.advance_to(self._clock.now_s + 1.0)
        return plan, results


@pytest.fixture(scope="module")
def tiny_executor(tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path) -> JaxExecutor:
    folder = make_tiny_model(tmp_path_factory.mktemp("timelines") / "tiny")
    source = open_model(folder)
    shape = timeline_config("sarathi", num_stages=1)
    config = EngineConfig(
        model=str(folder),
        dtype="float32",
        kernels="xla",
        token_budget=shape.token_budget,
        buckets=shape.buckets,
        max_num_seqs=shape.max_num_seqs,
        max_model_len=shape.max_model_len,
        page_size=shape.page_size,
        kv_cache_bytes=(shape.num_pages + 1) * PAGE_BYTES,
        compilation_cache_dir=compilation_cache,
    )
    settings = resolve_settings(config, source.config, jax.devices()[0])
    assert settings.scheduler.num_pages == shape.num_pages
    return build_executor(settings, source.load_params(settings.dtype), depth=1)


@pytest.mark.parametrize("policy", POLICIES)
def test_live_engine_draws_arrivals_beside_decodes(policy: str, tiny_executor: JaxExecutor) -> None:
    clock = VirtualClock()
    executor = OneSecondSteps(tiny_executor, clock)
    serve(timeline_config(policy, num_stages=1), executor, clock, beside_decodes())
    assert [plan_cells(plan) for plan in executor.plans] == golden_cells(ARRIVALS[policy])


@pytest.mark.parametrize("policy", POLICIES)
def test_simulator_draws_arrivals_beside_decodes(policy: str) -> None:
    steps = simulated(policy, 1, lambda _: (1.0, 0.0), beside_decodes())
    assert [plan_cells(step.plan) for step in steps] == golden_cells(ARRIVALS[policy])


@pytest.mark.parametrize("policy", POLICIES)
def test_simulator_draws_two_stages(policy: str) -> None:
    requests = [
        timeline_request(name, num_prompt, 3)
        for name, num_prompt in zip(NAMES, (16, 5, 12, 3), strict=True)
    ]
    steps = simulated(policy, 2, lambda plan: (float(max(2, plan.num_tokens)), 0.0), requests)
    assert [plan_cells(step.plan) for step in steps] == golden_cells(TWO_STAGES[policy])
    lanes = [
        line.split("|")[1]
        for line in TWO_STAGES[policy].split("\n")
        if line[0] == "s" and "|" in line
    ]
    assert [lane(steps, stage, len(lanes[0])) for stage in range(2)] == lanes


def simulated(
    policy: str, num_stages: int, stage_times: StageTimes, requests: Sequence[Request]
) -> list[SimStep]:
    clock = VirtualClock()
    executor = SimExecutor(clock, stage_times, num_stages=num_stages, record_steps=True)
    serve(timeline_config(policy, num_stages=num_stages), executor, clock, requests)
    assert executor.stats.steps is not None
    return executor.stats.steps


def lane(steps: Sequence[SimStep], stage: int, width: int) -> str:
    """Which step the stage runs, a letter per second."""
    text = ["."] * width
    for step in steps:
        start, end = int(step.stage_start_s[stage]), int(step.stage_start_s[stage] + step.stage_s)
        text[start:end] = "0123456789abcdefghijklmnopqrstuvwxyz"[step.plan.step_id] * (end - start)
    return "".join(text)
