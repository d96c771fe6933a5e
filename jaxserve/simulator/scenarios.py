"""Scenarios: a deployment, a workload and the settings that go with them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.policies import Policy, make_policy
from jaxserve.engine.scheduler.policies.fastertransformer import FasterTransformerPolicy
from jaxserve.engine.scheduler.policies.orca import OrcaPolicy
from jaxserve.engine.scheduler.rules import PageGrant
from jaxserve.errors import ConfigError
from jaxserve.simulator.deployments import DEPLOYMENTS, Deployment

PAGE_SIZE = 16
MAX_NUM_SEQS = 128
_WORKLOADS = {"chat": ("sharegpt", 8192), "arxiv": ("arxiv", 16384)}
"""Scenario's ending -> workload and most tokens of a sequence."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A published set-up: which model, which requests, which objectives."""

    name: str
    deployment: Deployment
    workload: str
    max_model_len: int
    start_qps: float

    def slo_s(self, slo: str) -> float:
        """A named objective of the deployment, or milliseconds as a number.

        Raises ConfigError for a name that the deployment does not have.
        """
        known = self.deployment.slo_s
        if slo in known:
            return known[slo]
        try:
            slo_s = float(slo) / 1e3
        except ValueError:
            slo_s = 0.0
        if slo_s <= 0:
            raise ConfigError(
                f"--slo must be one of {', '.join(known)} or P99 milliseconds between tokens, "
                f"not {slo!r}"
            )
        return slo_s

    def token_budget(self, slo: str) -> int:
        """The published one for the objective; 512 where there is none."""
        return self.deployment.token_budget.get(slo, 512)


def scenario_names() -> list[str]:
    return [
        f"{model}-{kind}"
        for model, deployment in DEPLOYMENTS.items()
        for kind in deployment.start_qps
    ]


def find_scenario(name: str) -> Scenario:
    """Raises ConfigError for a name that is not known."""
    model, _, kind = name.rpartition("-")
    deployment = DEPLOYMENTS.get(model)
    if deployment is None or kind not in deployment.start_qps:
        raise ConfigError(f"--scenario must be one of {', '.join(scenario_names())}, not {name!r}")
    workload, max_model_len = _WORKLOADS[kind]
    return Scenario(name, deployment, workload, max_model_len, deployment.start_qps[kind])


def make_sim_policy(policy: str, max_num_seqs: int, max_model_len: int) -> Policy:
    """A policy as it was published: Orca and FasterTransformer put any number
    of whole prompts into a step. Raises ConfigError for an unknown name."""
    rows = max_num_seqs * max_model_len
    if policy == OrcaPolicy.name:
        return OrcaPolicy(max_step_rows=rows)
    if policy == FasterTransformerPolicy.name:
        return FasterTransformerPolicy(max_step_rows=rows)
    return make_policy(policy)


def default_max_num_seqs(deployment: Deployment, policy: str) -> int:
    """128, or the small batch of policies that reserve whole sequences."""
    reserves = make_policy(policy).rules.page_grant is PageGrant.LONGEST_SEQUENCE
    return deployment.orca_max_num_seqs if reserves else MAX_NUM_SEQS


def scheduler_config(
    deployment: Deployment,
    policy: str,
    *,
    token_budget: int,
    max_model_len: int,
    max_num_seqs: int | None = None,
    max_seqs_per_step: int | None = None,
    num_pages: int | None = None,
    stream_chunks: bool = False,
    buckets: tuple[int, ...] = (),
) -> SchedulerConfig:
    """The scheduler as the published experiments configure it.

    `buckets` below a policy's largest step are kept, and that one is added.
    """
    max_num_seqs = max_num_seqs or default_max_num_seqs(deployment, policy)
    config = SchedulerConfig(
        num_pages=num_pages or deployment.num_pages,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        token_budget=token_budget,
        buckets=(token_budget,),
        page_size=PAGE_SIZE,
        max_queued_requests=1 << 30,
        max_queued_tokens=1 << 40,
        max_in_flight=deployment.pipeline_parallel,
        chain_decodes=False,
        stream_chunks=stream_chunks,
        max_seqs_per_step=max_seqs_per_step,
        prefix_caching=False,
        policy=policy,
    )
    rows = make_sim_policy(policy, max_num_seqs, max_model_len).max_step_rows(config)
    rows = max(rows, token_budget)
    return replace(config, buckets=tuple(sorted({*(b for b in buckets if b < rows), rows})))
