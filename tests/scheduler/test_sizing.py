"""Objectives on the engine's own settings: buckets by policy, and the measured budget."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import pytest

from jaxserve.engine.config import POLICIES, STEP_BUDGETS, EngineConfig
from jaxserve.engine.offline import complete_in_order
from jaxserve.engine.plan import StepPlan, StepResults
from jaxserve.engine.profile import measure_steps
from jaxserve.engine.request import GenerationRequest, Request
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler import policies
from jaxserve.engine.settings import EngineSettings, resolve_settings
from jaxserve.engine.sizing import make_scheduler
from jaxserve.engine.startup import start_engine
from jaxserve.engine.step_cost import FittedStepCost, fit_step_cost
from jaxserve.engine.step_features import StepFeatures
from jaxserve.errors import ConfigError
from models.config import ModelConfig
from models.loading import open_model
from tests.engine.tiny_model import make_tiny_model
from tests.scheduler.fake_device import results_of
from tests.scheduler.test_scheduler import make_request

COST = FittedStepCost(0.005, 0.001, 2e-6, 1e-7)
"""37 ms for 32 rows and 261 ms for 256, and up to 33 ms for 16k keys of decodes."""


class TimedExecutor:
    """Takes the time that a cost model says, on a clock of its own."""

    depth = 2

    def __init__(self, cost: FittedStepCost = COST) -> None:
        self.now_s = 0.0
        self.buckets: list[int] = []
        self._cost = cost
        self._in_flight: deque[StepPlan] = deque()

    def clock(self) -> float:
        return self.now_s

    def can_accept(self) -> bool:
        return len(self._in_flight) < self.depth

    def submit(self, plan: StepPlan) -> None:
        self.buckets.append(plan.num_rows_bucket)
        self._in_flight.append(plan)

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        plan = self._in_flight.popleft()
        self.now_s += self._cost.predict_s(StepFeatures.of(plan))
        num_rows = plan.num_sample_rows
        return plan, results_of(plan.step_id, [0] * num_rows, [0.0] * num_rows)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def resolve(tiny_folder: Path) -> Callable[..., EngineSettings]:
    model_config: ModelConfig = replace(
        open_model(tiny_folder).config, max_position_embeddings=4096
    )

    def resolve(**flags: Any) -> EngineSettings:
        return resolve_settings(EngineConfig(**flags), model_config, jax.devices("cpu")[0])

    return resolve


def test_the_flag_offers_every_policy() -> None:
    assert tuple(policies.POLICIES) == POLICIES


@pytest.mark.parametrize(
    ("policy", "buckets"),
    [
        ("sarathi", (4, 32, 128)),
        ("vllm_v1", (4, 32, 128)),
        ("vllm_v0", (4, 32, 128, 512, 2048)),
        ("fastertransformer", (4, 32, 128, 512, 2048)),
        ("orca", (4, 32, 128, 512, 2080)),
        ("hybrid_only", (4, 32, 128, 512, 2080)),
    ],
)
def test_whole_prompts_get_a_bucket_that_holds_the_longest(
    resolve: Callable[..., EngineSettings], policy: str, buckets: tuple[int, ...]
) -> None:
    assert resolve(policy=policy).scheduler.buckets == buckets


def test_given_buckets_that_hold_no_whole_prompt_are_refused(
    resolve: Callable[..., EngineSettings],
) -> None:
    for buckets in ("one", (32, 128)):
        with pytest.raises(ConfigError, match="up to 2047 rows"):
            resolve(policy="vllm_v0", buckets=buckets)
    resolve(policy="vllm_v0", buckets=(32, 300), max_model_len=300)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"step_budget": "money"}, "--step-budget must be one of tokens, time, slack"),
        ({"step_budget": "time"}, "needs --slo-tbt-ms"),
        ({"slo_tbt_ms": 0.0}, "--slo-tbt-ms must be positive"),
        ({"slo_tbt_ms": 50.0, "token_budget": 64}, "leave --token-budget out"),
        ({"slo_ttft_ms": 50.0}, "--policy slack"),
        ({"slo_tbt_ms": 50.0, "policy": "orca"}, "no effect on --policy orca"),
        ({"slo_tbt_ms": 50.0, "policy": "vllm_v1"}, "no effect on --policy vllm_v1"),
        ({"speculative_method": "eagle"}, "must be one of none, ngram"),
        ({"num_speculative_tokens": 3}, "no effect without --speculative-method ngram"),
        ({"speculative_method": "ngram", "num_speculative_tokens": 0}, "in 1 to 16, not 0"),
        ({"speculative_method": "ngram", "prompt_lookup_min": 17}, "--prompt-lookup-min 17"),
        ({"speculative_method": "ngram", "policy": "orca"}, "no effect on --policy orca"),
        (
            {"speculative_method": "ngram", "slo_tbt_ms": 50.0, "step_budget": "time"},
            "does not work with --step-budget time",
        ),
    ],
)
def test_options_that_cannot_be_followed_are_refused(
    resolve: Callable[..., EngineSettings], flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve(**flags)


def test_a_profile_covers_every_bucket_and_fits_its_model(
    resolve: Callable[..., EngineSettings],
) -> None:
    executor = TimedExecutor()
    scheduler = resolve(slo_tbt_ms=50.0).scheduler
    assert scheduler.buckets == (4, 32, 64, 128, 256)
    samples = measure_steps(scheduler, executor, clock=executor.clock)
    assert {step.num_rows_bucket for step, _ in samples} == set(scheduler.buckets)
    assert all(step.num_tokens == step.num_rows_bucket for step, _ in samples)
    fitted = fit_step_cost(samples)
    for step, seconds in samples:
        assert fitted.predict_s(step) == pytest.approx(seconds, rel=1e-3)
    assert fitted.decode_context_s == pytest.approx(2e-6, rel=1e-2)
    assert fitted.pair_s == pytest.approx(1e-7, rel=1e-2)


def test_a_profile_stays_within_its_time(resolve: Callable[..., EngineSettings]) -> None:
    slow = FittedStepCost(0.0, 0.02, 0.0, 0.0)
    executor = TimedExecutor(slow)
    scheduler = resolve(slo_tbt_ms=50.0).scheduler
    measure_steps(scheduler, executor, limit_s=30.0, clock=executor.clock)
    assert executor.now_s <= 30.0
    assert max(executor.buckets) == 64


@pytest.mark.parametrize(("slo_tbt_ms", "token_budget"), [(100, 32), (125, 64), (220, 128)])
def test_the_token_budget_is_the_largest_that_keeps_the_objective(
    resolve: Callable[..., EngineSettings], slo_tbt_ms: float, token_budget: int
) -> None:
    """Half of the pool's 16k keys cost 33 ms beside a millisecond a row, and a chunk at the end
    of a prompt 0.2 ms a token beside that; a tenth of the objective is left to the host."""
    executor = TimedExecutor()
    settings = resolve(slo_tbt_ms=float(slo_tbt_ms))
    settings, scheduler = make_scheduler(settings, executor, clock=executor.clock)
    assert settings.scheduler.token_budget == scheduler.config.token_budget == token_budget
    assert scheduler.config.buckets[-1] == token_budget
    with pytest.raises(ConfigError, match="--slo-tbt-ms 10 is shorter"):
        make_scheduler(resolve(slo_tbt_ms=10.0), executor, clock=executor.clock)


@pytest.mark.parametrize("step_budget", STEP_BUDGETS)
@pytest.mark.parametrize("policy", ["sarathi", "slack"])
def test_steps_of_the_live_settings_keep_the_objective(
    resolve: Callable[..., EngineSettings], policy: str, step_budget: str
) -> None:
    """Decodes with a long prompt beside them: no step is predicted above it."""
    executor = TimedExecutor()
    settings = resolve(slo_tbt_ms=150.0, policy=policy, step_budget=step_budget, max_num_seqs=8)
    _, scheduler = make_scheduler(settings, executor, clock=executor.clock)
    longest_s, num_tokens = 0.0, 0
    for request in live_requests():
        scheduler.add(request)
    while scheduler.has_work:
        plan = scheduler.plan(executor.now_s)
        if plan is not None:
            executor.submit(plan)
            num_tokens = max(num_tokens, plan.num_tokens)
            continue
        before_s = executor.now_s
        plan, results = executor.next_completion()
        if plan.decodes:
            longest_s = max(longest_s, executor.now_s - before_s)
        scheduler.commit(plan, results, executor.now_s)
    assert num_tokens > 60
    # A deadline by slack lets a request that is ahead wait longer for one token.
    assert longest_s <= 0.150 or step_budget == "slack"


def live_requests() -> list[Request]:
    short = [make_request(f"s{i}", 20, max_tokens=60, first_token=10 * i) for i in range(6)]
    return [*short, make_request("long", 1500, max_tokens=3, first_token=5000)]


@pytest.mark.long
@pytest.mark.usefixtures("quick_compilation")
def test_every_policy_serves_the_same_tokens(tiny_folder: Path, compilation_cache: Path) -> None:
    """On the real step, with prompts beyond the token budget."""
    sampling = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    outputs = {}
    for policy in POLICIES:
        running = start_engine(
            EngineConfig(
                model=str(tiny_folder),
                policy=policy,
                dtype="float32",
                max_num_seqs=4,
                page_size=4,
                compilation_cache_dir=compilation_cache,
                **({} if policy in WHOLE else {"token_budget": 8}),
            )
        )
        try:
            requests = [
                GenerationRequest(f"r{i}", tuple(range(i, i + 5 + 6 * i)), sampling)
                for i in range(8)
            ]
            completions = complete_in_order(running.engine, requests, max_ahead=8)
            outputs[policy] = [completion.token_ids for completion in completions]
            assert running.engine.snapshot().compiles_after_ready == 0
            num_rows = max(running.report.settings.scheduler.buckets)
            assert (num_rows >= 63) == (policy in WHOLE)
        finally:
            running.close()
    assert all(tokens == outputs["sarathi"] for tokens in outputs.values())


WHOLE = {name for name, policy in policies.POLICIES.items() if policy.rules.whole_prompts}


def test_a_time_objective_on_the_real_step(tiny_folder: Path, compilation_cache: Path) -> None:
    phases: dict[str, float] = {}
    running = start_engine(
        EngineConfig(
            model=str(tiny_folder),
            max_num_seqs=4,
            page_size=4,
            slo_tbt_ms=60_000.0,
            buckets=(4, 8),
            compilation_cache_dir=compilation_cache,
        ),
        on_phase=phases.__setitem__,
    )
    try:
        assert running.report.settings.scheduler.token_budget == 8
        sampling = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
        (done,) = complete_in_order(
            running.engine, [GenerationRequest("r", (1, 2, 3), sampling)], max_ahead=1
        )
        assert len(done.token_ids) == 3
        assert running.engine.snapshot().compiles_after_ready == 0
        assert 0 < phases["measure steps"] < 60
    finally:
        running.close()
