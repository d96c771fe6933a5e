"""One simulated run: requests of given lengths and arrivals through the engine's loop."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jaxserve.engine.loop import Committed, EngineLoop
from jaxserve.engine.metrics import EngineMetrics
from jaxserve.engine.request import GenerationRequest, Request, ServiceObjective
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.budget import StepBudget
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.scheduler import Scheduler
from jaxserve.simulator.clock import VirtualClock
from jaxserve.simulator.cost_models.base import CostModel
from jaxserve.simulator.scenarios import make_sim_policy
from jaxserve.simulator.sim_executor import SimExecutor, SimStats, modelled
from jaxserve.simulator.stopwatch import Stopwatch, Timing
from jaxserve.simulator.trace_source import TraceSource
from jaxserve.simulator.workloads import Lengths


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One request of a workload."""

    lengths: Lengths
    arrival_s: float
    objective: ServiceObjective | None = None
    priority: int = 0


@dataclass(frozen=True, slots=True)
class SimEngine:
    """What serves the requests."""

    scheduler: SchedulerConfig
    cost: CostModel
    num_stages: int = 1
    make_budget: Callable[[], StepBudget] | None = None
    """None: the configuration's token budget."""

    def make_scheduler(self) -> Scheduler:
        config = self.scheduler
        return Scheduler(
            config,
            policy=make_sim_policy(config.policy, config.max_num_seqs, config.max_model_len),
            budget=None if self.make_budget is None else self.make_budget(),
        )


@dataclass(frozen=True, slots=True)
class SimRun:
    """What came out. Incomplete if the run was given up."""

    complete: bool
    end_s: float
    timings: Sequence[Timing]
    """Of finished requests, in the order in which they finished; after them those that had given
    tokens when the run was ended by `until_s`."""
    stats: SimStats
    num_preemptions: int
    metrics: EngineMetrics


def simulate(
    engine: SimEngine,
    requests: Sequence[SimRequest],
    *,
    stopwatch: Stopwatch | None = None,
    give_up: Callable[[Stopwatch], bool] | None = None,
    until_s: float = math.inf,
    record_steps: bool = False,
) -> SimRun:
    """Serves `requests` (ascending in `arrival_s`) in virtual time.

    Args:
        stopwatch: counts what `give_up` looks at.
        give_up: asked after each step; True ends the run there.
        until_s: the run ends when a step is done then or later, whatever is unfinished; that step's
            tokens do not count.
        record_steps: keep every step in `stats.steps`.

    Raises SimulationStuck if a request can never be scheduled.
    """
    clock = VirtualClock()
    scheduler = engine.make_scheduler()
    executor = SimExecutor(
        clock,
        modelled(engine.cost),
        num_stages=engine.num_stages,
        depth=engine.scheduler.max_in_flight,
        record_steps=record_steps,
    )
    source = TraceSource(_scheduler_requests(requests), clock, executor)
    stopwatch = stopwatch or Stopwatch()
    metrics = EngineMetrics()
    loop = EngineLoop(scheduler, executor, source, stopwatch, metrics, clock)
    committed: Committed | None = None
    num_requests, finished = len(requests), stopwatch.finished
    gave_up = False
    while len(finished) < num_requests and not gave_up and clock.now_s < until_s:
        loop.wait_for_work()
        committed = loop.turn(committed)
        gave_up = give_up is not None and give_up(stopwatch)
    if not gave_up and len(finished) == num_requests:
        loop.finish_in_flight()
        scheduler.check_integrity()
    return SimRun(
        complete=not gave_up,
        end_s=clock.now_s,
        timings=finished if gave_up else [*finished, *stopwatch.started()],
        stats=executor.stats,
        num_preemptions=scheduler.num_preemptions,
        metrics=metrics,
    )


def _scheduler_requests(requests: Sequence[SimRequest]) -> list[Request]:
    """Prompts of token 0 that generate exactly as many tokens as they should."""
    longest = max((r.lengths.num_prompt_tokens for r in requests), default=0)
    zeros = (0,) * longest
    made = []
    for index, request in enumerate(requests):
        num_prompt, num_output = request.lengths
        generation = GenerationRequest(
            request_id=f"r{index}",
            prompt_token_ids=zeros[:num_prompt],
            sampling=SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True),
            objective=request.objective,
            priority=request.priority,
        )
        made.append(
            Request(
                generation=generation,
                max_tokens=num_output,
                seed=0,
                stop_token_ids=frozenset(),
                arrival_s=request.arrival_s,
            )
        )
    return made
