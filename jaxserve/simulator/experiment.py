"""Experiment: everything that is fixed while policies and rates are compared."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxserve.engine.request import ServiceObjective
from jaxserve.engine.scheduler.budget import StepBudget, TimeBudget
from jaxserve.engine.scheduler.policies import make_policy
from jaxserve.errors import ConfigError
from jaxserve.simulator.arrivals import ArrivalProcess
from jaxserve.simulator.cost_models.base import CostModel, HostCost
from jaxserve.simulator.cost_models.gpu import GpuCostModel
from jaxserve.simulator.cost_models.operators import packaged_a100, read_profile
from jaxserve.simulator.cost_models.roofline import Roofline, RooflineCostModel
from jaxserve.simulator.deployments import Deployment
from jaxserve.simulator.run import SimEngine, SimRequest
from jaxserve.simulator.scenarios import scheduler_config
from jaxserve.simulator.workloads import Lengths, read_trace, sample_lengths

MIN_CHUNK = 64
"""Tokens that a prefill gets in any step, whatever its predicted time."""
COST_MODELS = ("fitted", "table", "roofline")


def make_cost_model(
    name: str,
    deployment: Deployment,
    host: HostCost,
    *,
    profile: Path | None = None,
    bucketed: bool = False,
) -> CostModel:
    """A cost model by name. Raises ConfigError for a name or a profile that can't work."""
    if name not in COST_MODELS:
        raise ConfigError(f"--cost-model must be one of {', '.join(COST_MODELS)}, not {name!r}")
    if (name == "table") != (profile is not None):
        raise ConfigError("--cost-model table and --profile FOLDER (of CSVs) go together")
    if name == "roofline":
        return RooflineCostModel(deployment, Roofline(), host)
    times = packaged_a100()
    if profile is not None:
        times = read_profile(profile, times.attention)
    return GpuCostModel(deployment, times, host, bucketed=bucketed)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests without a rate: `unit_times_s` are for one request a second."""

    lengths: Sequence[Lengths]
    unit_times_s: np.ndarray
    objective: ServiceObjective | None = None

    def at(self, qps: float) -> list[SimRequest]:
        times_s = self.unit_times_s / qps
        return [
            SimRequest(lengths, float(time_s), self.objective)
            for lengths, time_s in zip(self.lengths, times_s, strict=True)
        ]


def make_workload(
    name: str,
    num_requests: int,
    seed: int,
    *,
    max_model_len: int,
    arrivals: ArrivalProcess,
    trace: Path | None = None,
) -> Workload:
    """A generated workload, or requests of a trace that fit `max_model_len`.

    A replay takes the trace's first requests in their order, other arrivals
    draw requests from it. Raises ConfigError.
    """
    if trace is None:
        lengths = sample_lengths(name, num_requests, seed, max_model_len=max_model_len)
        return Workload(lengths, arrivals.unit_times_s(num_requests, seed))
    all_lengths, times_s = read_trace(trace)
    fitting = [index for index, pair in enumerate(all_lengths) if sum(pair) <= max_model_len]
    if len(fitting) < num_requests:
        raise ConfigError(
            f"--trace {trace} has {len(fitting)} requests of at most {max_model_len} tokens: "
            f"lower --num-requests from {num_requests} or raise --max-model-len"
        )
    if arrivals.kind == "replay":
        chosen = fitting[:num_requests]
    else:
        rng = np.random.default_rng(seed)
        chosen = rng.choice(np.array(fitting), num_requests, replace=False).tolist()
    trace_s = None if times_s is None else [times_s[index] for index in chosen]
    return Workload(
        [all_lengths[index] for index in chosen],
        arrivals.unit_times_s(num_requests, seed, trace_s),
    )


@dataclass(frozen=True, slots=True)
class Experiment:
    """What serves, apart from the policy."""

    deployment: Deployment
    cost: CostModel
    max_model_len: int
    token_budget: int
    max_num_seqs: int | None = None
    """None: the published one of each policy."""
    num_pages: int | None = None
    buckets: tuple[int, ...] = ()
    stream_chunks: bool = False
    step_time_s: float | None = None
    """Chunks fill a step up to this predicted time, at most `token_budget` rows,
    under policies that can follow it. None: up to `token_budget` rows."""

    def engine(self, policy: str) -> SimEngine:
        """Raises ConfigError for a policy that is not known or can't work so."""
        return SimEngine(
            scheduler=scheduler_config(
                self.deployment,
                policy,
                token_budget=self.token_budget,
                max_model_len=self.max_model_len,
                max_num_seqs=self.max_num_seqs,
                num_pages=self.num_pages,
                buckets=self.buckets,
                stream_chunks=self.stream_chunks,
            ),
            cost=self.cost,
            num_stages=self.deployment.pipeline_parallel,
            make_budget=self._make_budget(policy),
        )

    def _make_budget(self, policy: str) -> Callable[[], StepBudget] | None:
        target_s = self.step_time_s
        if target_s is None or not make_policy(policy).rules.sizes_chunks:
            return None
        return lambda: TimeBudget(
            self.cost, target_s, max_rows=self.token_budget, min_chunk=MIN_CHUNK
        )
