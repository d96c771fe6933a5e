"""A capacity search of one policy in one scenario."""

from __future__ import annotations

import math
from dataclasses import dataclass

from jaxserve.simulator.arrivals import ArrivalProcess
from jaxserve.simulator.capacity import Objective, find_capacity
from jaxserve.simulator.cost_models.base import HostCost
from jaxserve.simulator.experiment import Experiment, make_cost_model, make_workload
from jaxserve.simulator.scenarios import find_scenario


@dataclass(frozen=True, slots=True)
class CapacityCell:
    """One capacity search."""

    scenario: str
    slo: str
    policy: str
    num_requests: int
    clip: float | None
    token_budget: int | None = None
    max_num_seqs: int | None = None
    until_s: float = math.inf
    """When each run of the search ends, whatever is unfinished."""

    def capacity(self, seed: int) -> float:
        found = find_scenario(self.scenario)
        experiment = experiment_of(self.scenario, self.slo, self.token_budget, self.max_num_seqs)
        workload = make_workload(
            found.workload,
            self.num_requests,
            seed,
            max_model_len=found.max_model_len,
            arrivals=ArrivalProcess(clip=self.clip),
        )
        objective = Objective(found.slo_s(self.slo))
        engine = experiment.engine(self.policy)
        return find_capacity(
            engine, workload, objective, start_qps=found.start_qps, until_s=self.until_s
        )[0]


def experiment_of(
    scenario: str, slo: str, token_budget: int | None = None, max_num_seqs: int | None = None
) -> Experiment:
    """A scenario's, with the published token budget unless one is given."""
    found = find_scenario(scenario)
    return Experiment(
        deployment=found.deployment,
        cost=make_cost_model("fitted", found.deployment, HostCost()),
        max_model_len=found.max_model_len,
        token_budget=token_budget or found.token_budget(slo),
        max_num_seqs=max_num_seqs,
    )
