"""Sizing: the scheduler that keeps the objectives on this machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

from jaxserve.engine.executor import Executor
from jaxserve.engine.profile import LIMIT_S, measure_steps
from jaxserve.engine.scheduler.auto_budget import auto_token_budget
from jaxserve.engine.scheduler.budget import TBT_MARGIN, SlackBudget, StepBudget, TimeBudget
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.policies import Policy, make_policy
from jaxserve.engine.scheduler.policies.slack import SlackPolicy
from jaxserve.engine.scheduler.replica_scheduler import ReplicaScheduler
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.engine.settings import EngineSettings
from jaxserve.engine.step_cost import StepCost, fit_step_cost
from jaxserve.engine.step_features import StepFeatures


def make_scheduler(
    settings: EngineSettings,
    executor: Executor,
    *,
    limit_s: float = LIMIT_S,
    clock: Callable[[], float] = perf_counter,
) -> tuple[EngineSettings, Scheduler | ReplicaScheduler]:
    """The scheduler (of several replicas, one with theirs in it), and the settings with what was
    chosen for it.

    If there is an objective for the time between tokens, steps are measured
    first, for up to `limit_s`. Raises ConfigError if no step keeps it.
    """
    config = settings.scheduler
    if not settings.has_tbt_objective:
        return settings, _for_replicas(
            settings, lambda: Scheduler(config, policy=_policy(settings, None))
        )
    samples = measure_steps(config, executor, limit_s=limit_s, clock=clock)
    cost = fit_step_cost(samples)
    num_measured_rows = samples[-1][0].num_rows_bucket
    tbt_s = settings.objective.tbt_s
    budget: StepBudget | None = None
    if settings.step_budget == "tokens":
        config = _with_token_budget(config, cost, tbt_s, num_measured_rows)
    elif settings.step_budget == "time":
        budget = TimeBudget(cost, tbt_s * TBT_MARGIN, max_rows=config.token_budget)
    else:
        budget = SlackBudget(cost, settings.objective, max_rows=config.token_budget)
    settings = replace(settings, scheduler=config)
    return settings, _for_replicas(
        settings,
        lambda: Scheduler(config, policy=_policy(settings, samples[-1]), budget=budget),
    )


def _for_replicas(
    settings: EngineSettings, make: Callable[[], Scheduler]
) -> Scheduler | ReplicaScheduler:
    if settings.mesh.data == 1:
        return make()
    return ReplicaScheduler([make() for _ in range(settings.mesh.data)])


def _with_token_budget(
    config: SchedulerConfig, cost: StepCost, tbt_s: float, num_measured_rows: int
) -> SchedulerConfig:
    """The largest measured bucket as token budget that keeps the objective."""
    measured = [rows for rows in config.buckets if rows <= num_measured_rows]
    token_budget = auto_token_budget(config, cost, tbt_s, measured, margin=TBT_MARGIN)
    buckets = tuple(rows for rows in config.buckets if rows <= token_budget)
    return replace(config, token_budget=token_budget, buckets=buckets)


def _policy(settings: EngineSettings, largest: tuple[StepFeatures, float] | None) -> Policy:
    """The policy by name; one of deadlines learns the objective and the throughput."""
    name = settings.scheduler.policy
    if name != SlackPolicy.name:
        return make_policy(name)
    if largest is None:
        return SlackPolicy(settings.objective)
    step, seconds = largest
    return SlackPolicy(settings.objective, tokens_per_s=step.num_tokens / seconds)
