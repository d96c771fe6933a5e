"""Does a policy keep up just below what the device can do at most?

Small uniform requests on a device whose step takes `base_s + token_s * tokens`.
A work-conserving policy that mixes phases keeps a bounded queue at any load
below the limit; one that waits for whole batches does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.step_features import StepFeatures
from jaxserve.simulator.cost_models.base import StageCost
from jaxserve.simulator.metrics import Latencies
from jaxserve.simulator.run import SimEngine, SimRequest, simulate
from jaxserve.simulator.scenarios import make_sim_policy
from jaxserve.simulator.workloads import Lengths


@dataclass(frozen=True, slots=True)
class AffineCostModel:
    """A step takes `base_s + token_s * tokens`."""

    base_s: float = 0.010
    token_s: float = 0.0001

    def stage_cost(self, step: StepFeatures) -> StageCost:
        return StageCost(self.token_s * step.num_tokens, 0.0, 0.0, 0.0, self.base_s)

    def predict_s(self, step: StepFeatures) -> float:
        return self.base_s + self.token_s * step.num_tokens

    def transfer_s(self, num_rows: int) -> float:  # noqa: ARG002  one stage
        return 0.0


@dataclass(frozen=True, slots=True)
class StabilityRun:
    """How the queue fared over the run."""

    policy: str
    load: float
    early_delay_s: float
    """Mean scheduling delay of the second tenth of the requests."""
    late_delay_s: float
    """The same of the last tenth: far larger if the queue grows without bound."""
    arrivals_s: float
    """When the last request came."""

    @property
    def growth(self) -> float:
        """Delay gained per second of arrivals; near 0 for a stable queue."""
        return (self.late_delay_s - self.early_delay_s) / self.arrivals_s


def limit_requests_per_s(
    cost: AffineCostModel, token_budget: int, num_prompt: int, num_output: int
) -> float:
    """Every step full: the most that any policy with this budget can serve."""
    tokens_per_request = num_prompt + num_output - 1
    full_step_s = cost.base_s + cost.token_s * token_budget
    return token_budget / full_step_s / tokens_per_request


def run_at_load(
    policy: str,
    load: float,
    *,
    num_requests: int = 20_000,
    seed: int = 1,
    num_prompt: int = 96,
    num_output: int = 16,
    token_budget: int = 256,
    max_num_seqs: int = 128,
) -> StabilityRun:
    """Poisson arrivals at `load` times the limit; lengths are uniform around
    their means. Memory is no limit."""
    rng = np.random.default_rng(seed)
    cost = AffineCostModel()
    rate = load * limit_requests_per_s(cost, token_budget, num_prompt, num_output)
    prompts = rng.integers(num_prompt // 2, num_prompt + num_prompt // 2 + 1, num_requests)
    outputs = rng.integers(num_output // 2, num_output + num_output // 2 + 1, num_requests)
    times_s = np.cumsum(rng.exponential(1 / rate, num_requests))
    requests = [
        SimRequest(Lengths(int(prompt), int(output)), float(time_s))
        for prompt, output, time_s in zip(prompts, outputs, times_s, strict=True)
    ]
    max_model_len = 2 * (num_prompt + num_output)
    config = SchedulerConfig(
        num_pages=2 * max_num_seqs * (max_model_len // 16 + 1),
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        buckets=(max(token_budget, max_num_seqs * max_model_len),),
        max_queued_requests=1 << 30,
        max_queued_tokens=1 << 40,
        max_in_flight=1,
        prefix_caching=False,
        policy=make_sim_policy(policy, max_num_seqs, max_model_len).name,
    )
    run = simulate(SimEngine(config, cost), requests)
    # In the order of arrival, not of finishing.
    timings = sorted(run.timings, key=lambda timing: timing.request.arrival_s)
    delays_s = Latencies.of(timings).queue_s
    tenth = num_requests // 10
    return StabilityRun(
        policy=policy,
        load=load,
        early_delay_s=float(delays_s[tenth : 2 * tenth].mean()),
        late_delay_s=float(delays_s[-tenth:].mean()),
        arrivals_s=float(times_s[-1]),
    )
