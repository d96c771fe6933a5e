"""Policies: the order of requests, selectable by name."""

from __future__ import annotations

from jaxserve.engine.scheduler.policies.base import Policy
from jaxserve.engine.scheduler.policies.chunked_only import ChunkedOnlyPolicy
from jaxserve.engine.scheduler.policies.decode_maximal import DecodeMaximalPolicy
from jaxserve.engine.scheduler.policies.fastertransformer import FasterTransformerPolicy
from jaxserve.engine.scheduler.policies.orca import OrcaPolicy
from jaxserve.engine.scheduler.policies.sarathi import HybridOnlyPolicy, SarathiPolicy
from jaxserve.engine.scheduler.policies.slack import SlackPolicy
from jaxserve.engine.scheduler.policies.vllm import VllmV0Policy, VllmV1Policy
from jaxserve.errors import ConfigError

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy
    for policy in (
        SarathiPolicy,
        DecodeMaximalPolicy,
        OrcaPolicy,
        VllmV0Policy,
        FasterTransformerPolicy,
        ChunkedOnlyPolicy,
        HybridOnlyPolicy,
        VllmV1Policy,
        SlackPolicy,
    )
}


def make_policy(name: str) -> Policy:
    """A new instance. Raises ConfigError for a name that is not known."""
    if name not in POLICIES:
        raise ConfigError(f"--policy must be one of {', '.join(POLICIES)}, not {name!r}")
    return POLICIES[name]()


__all__ = ["POLICIES", "Policy", "make_policy"]
