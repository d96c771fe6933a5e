"""Properties S1 to S8 under random traffic; `PropertyMonitor` checks each step.

`test_scheduler_mutants.py` shows that each of them can fail.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.plan import StepPlan
from jaxserve.engine.request import FinishReason
from jaxserve.engine.scheduler.config import SchedulerConfig
from tests.scheduler.driver import Run, RunStats, Traffic, random_request, random_run

DEPTHS = [(1, True), (2, True), (2, False), (4, False)]
SEEDS = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize(("max_in_flight", "chain_decodes"), DEPTHS)
def test_random_traffic(max_in_flight: int, chain_decodes: bool) -> None:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(seed=SEEDS)
    def check(seed: int) -> None:
        random_run(seed, 50, max_in_flight=max_in_flight, chain_decodes=chain_decodes)

    check()


TIGHT = SchedulerConfig(
    num_pages=14,
    max_model_len=48,
    max_num_seqs=6,
    token_budget=12,
    buckets=(2, 6, 12),
    page_size=4,
    watermark=0.05,
)
OVERLOAD = Traffic(
    arrival_rate=1.0, abort_rate=0.01, max_prompt=12, max_output=36, prompt_logprobs_share=0.2
)


@pytest.mark.parametrize("prefix_caching", [False, True])
def test_overload_in_a_tiny_pool(prefix_caching: bool) -> None:
    """S4, S5, S7 where memory is always short: the run must preempt, and often."""
    config = SchedulerConfig(
        **{name: getattr(TIGHT, name) for name in TIGHT.__slots__}
        | {"prefix_caching": prefix_caching}
    )
    stats = Run(config, seed=1, traffic=OVERLOAD).steps(1500)
    assert stats.num_preemptions > 60
    assert stats.num_finished > 100
    assert (stats.num_cached_tokens > 0) == prefix_caching


@pytest.mark.parametrize("moment", ["before_plan", "planned", "committed"])
@pytest.mark.parametrize("chain_decodes", [True, False])
def test_abort_at_every_moment(moment: str, chain_decodes: bool) -> None:
    """Each of a few requests is cancelled at each step of its life."""
    num_cancelled = 0
    for victim in ("r0", "r2", "r4"):
        for step in range(60):
            run = _small_run(chain_decodes)
            for _ in range(step):
                _advance(run)
            if victim not in run.monitor.live:
                break
            if moment == "planned":
                run.plan()
            elif moment == "committed":
                run.commit()
            if victim in run.monitor.live:
                run.finish(victim)
                num_cancelled += 1
            while run.scheduler.has_work:
                _advance(run)
            run.monitor.drained()
    assert num_cancelled > 20


def _small_run(chain_decodes: bool) -> Run:
    config = SchedulerConfig(
        num_pages=12,
        max_model_len=32,
        max_num_seqs=4,
        token_budget=8,
        buckets=(4, 8),
        page_size=4,
        watermark=0.0,
        chain_decodes=chain_decodes,
    )
    run = Run(config, seed=7, traffic=Traffic())
    rng = random.Random(3)
    for index in range(5):
        run.add(random_request(rng, f"r{index}", config, Traffic(max_prompt=12, max_output=20)))
    return run


def _advance(run: Run) -> None:
    if not run.plan():
        run.commit()


def test_preempted_streams_equal_unpreempted_ones() -> None:
    """S7: the same requests in a pool that forces preemption and in one that never does."""
    rng = random.Random(5)
    traffic = Traffic(max_prompt=12, max_output=36)
    requests = [random_request(rng, f"r{index}", TIGHT, traffic) for index in range(30)]
    outputs = []
    for num_pages in (14, 400):
        config = SchedulerConfig(
            **{name: getattr(TIGHT, name) for name in TIGHT.__slots__} | {"num_pages": num_pages}
        )
        run = Run(config, seed=0, traffic=traffic)
        copies = [
            type(request)(
                generation=request.generation,
                max_tokens=request.max_tokens,
                seed=request.seed,
                stop_token_ids=request.stop_token_ids,
                arrival_s=0.0,
            )
            for request in requests
        ]
        for request in copies:
            run.add(request)
        while run.scheduler.has_work:
            _advance(run)
        run.monitor.drained()
        assert all(
            request.finish_reason in (FinishReason.STOP, FinishReason.LENGTH) for request in copies
        )
        assert (run.scheduler.num_preemptions > 10) == (num_pages == 14)
        outputs.append([request.output_token_ids for request in copies])
    assert outputs[0] == outputs[1]


def test_plans_are_values_that_depend_on_the_input_alone() -> None:
    first, second = (_recorded_plans() for _ in range(2))
    assert len(first) > 20
    assert [hash(plan) for plan in first] == [hash(plan) for plan in second]
    assert first == second


def _recorded_plans() -> list[StepPlan]:
    run = _small_run(chain_decodes=True)
    plans = []
    while run.scheduler.has_work:
        if run.plan():
            plans.append(run.monitor.in_flight[-1][0])
        else:
            run.commit()
    return plans


@pytest.mark.long
@pytest.mark.parametrize("block", range(8))
def test_many_random_steps(block: int) -> None:
    """Together at least 10^5 steps, half of them where memory is short."""
    total = [random_run(seed, 100) for seed in range(block * 1000, block * 1000 + 60)]
    total.append(Run(TIGHT, block, OVERLOAD).steps(6000))
    assert sum(stats.num_steps for stats in total) >= 12_500
    assert _sum(total, "num_preemptions") > 500
    assert _sum(total, "num_finished") > 2000
    assert _sum(total, "num_cached_tokens") > 1000


def _sum(total: list[RunStats], name: str) -> int:
    return sum(getattr(stats, name) for stats in total)
