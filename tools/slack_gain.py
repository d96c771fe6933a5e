"""How much more load a slack budget serves well than fixed ones, in the simulator.

Two classes of service share an A100 that serves Mistral-7B: deadline order with a slack budget,
against Sarathi with the fixed budget that the quick class's objective gives, and with others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxserve.engine.scheduler.budget import choose_token_budget
from jaxserve.engine.step_cost import StepCost
from jaxserve.engine.step_features import StepFeatures
from jaxserve.simulator.arrivals import ArrivalProcess
from jaxserve.simulator.cost_models.base import HostCost
from jaxserve.simulator.deployments import find_deployment
from jaxserve.simulator.experiment import Experiment, Workload, make_cost_model, make_workload
from jaxserve.simulator.run import SimEngine
from jaxserve.simulator.service_classes import (
    QUICK,
    RATE_TOLERANCE,
    Goodput,
    find_goodput,
    goodput_at,
    slack_engine,
)
from jaxserve.simulator.workloads import Lengths

BUDGETS = (512, 1024, 256)
"""Fixed budgets beside the automatic one, in the order in which they are tried."""
MAX_ROWS = 2560
"""Of a step under the slack budget."""


@dataclass(frozen=True, slots=True)
class SlackCase:
    """A workload, and about the rate that the slack budget serves well."""

    workload: str
    start_qps: float
    num_requests: int


CASES: Mapping[str, SlackCase] = {
    case.workload: case
    for case in (
        SlackCase("azure_conv", 7.0, 1500),
        SlackCase("azure_code", 5.8, 1500),
        SlackCase("sharegpt", 2.3, 600),
    )
}


@dataclass(frozen=True, slots=True)
class SlackGain:
    """Highest loads served well, with one seed."""

    slack: Goodput
    auto: Goodput
    """Under the budget that the quick class's objective gives."""
    best: Goodput
    best_budget: int
    """The fixed budget with the highest; the automatic one unless another serves more, by more
    than the search's tolerance."""
    sustained_qps: float
    """What no order of work exceeds in a load without end; see `most_sustained_qps`."""

    @property
    def over_auto(self) -> float:
        return self.slack.qps / self.auto.qps

    @property
    def over_best(self) -> float:
        return self.slack.qps / self.best.qps


def compare_budgets(name: str, seed: int) -> SlackGain:
    """The case `name` with one seed.

    A fixed budget is searched only if it serves more than the best one so far does; one run
    tells.
    """
    case, experiment = CASES[name], mistral()
    workload = make_workload(
        case.workload, case.num_requests, seed, max_model_len=8192, arrivals=ArrivalProcess()
    )
    ours = slack_engine(experiment, max_rows=MAX_ROWS)
    slack = find_goodput(ours, workload, seed, start_qps=case.start_qps)
    best_budget = auto_budget(experiment)
    auto = best = find_goodput(
        _fixed(experiment, best_budget), workload, seed, start_qps=slack.qps / 1.1
    )
    for budget in BUDGETS:
        found = _better(_fixed(experiment, budget), workload, seed, best)
        if found is not None:
            best, best_budget = found, budget
    sustained = most_sustained_qps(experiment.cost, workload.lengths, MAX_ROWS)
    return SlackGain(slack, auto, best, best_budget, sustained)


def most_sustained_qps(cost: StepCost, lengths: Sequence[Lengths], max_rows: int) -> float:
    """Requests per second if all steps had the best size up to `max_rows`, and requests never
    ended to come.

    An upper bound for every policy and budget: rows of a step cost least at that size, and what
    decodes and prompts cost beside does not depend on the order.
    """
    prompts, outputs = np.array(lengths, dtype=float).T
    decodes = outputs - 1  # The first token comes with the prompt's last chunk.
    pairs = float(np.mean(prompts**2 / 2))
    context = float(np.mean(decodes * (prompts + outputs / 2)))
    best_qps = 0.0
    for num_rows in range(64, max_rows + 1, 8):
        requests = num_rows / float(np.mean(prompts + decodes))  # In one step.
        # Rounded down, which makes the step cheaper.
        num_decodes, num_prefills = int(requests * float(np.mean(decodes))), max(1, int(requests))
        step = StepFeatures(
            num_tokens=num_rows,
            num_rows_bucket=num_rows,
            num_seqs=num_decodes + num_prefills,
            num_decodes=num_decodes,
            decode_context=int(requests * context),
            num_prefills=num_prefills,
            num_prefill_tokens=num_rows - num_decodes,
            prefill_pairs=requests * pairs,
        )
        best_qps = max(best_qps, requests / cost.predict_s(step))
    return best_qps


def _better(engine: SimEngine, workload: Workload, seed: int, best: Goodput) -> Goodput | None:
    """What serves more than `best`; None if it does not."""
    more_qps = best.qps * (1 + RATE_TOLERANCE)
    if goodput_at(engine, workload, seed, more_qps) is None:
        return None
    return find_goodput(engine, workload, seed, start_qps=more_qps)


def _fixed(experiment: Experiment, budget: int) -> SimEngine:
    return replace(experiment, token_budget=budget).engine("sarathi")


def auto_budget(experiment: Experiment) -> int:
    """The largest budget whose full step keeps the quick class's time between tokens."""
    return choose_token_budget(
        experiment.cost,
        QUICK.tbt_s,
        range(128, 2049, 64),
        num_decodes=32,
        decode_context=32 * 1024,
        chunk_start=1024,
    )


def mistral() -> Experiment:
    deployment = find_deployment("mistral-7b")
    return Experiment(
        deployment=deployment,
        cost=make_cost_model("fitted", deployment, HostCost()),
        max_model_len=8192,
        token_budget=512,
        max_num_seqs=128,
    )
