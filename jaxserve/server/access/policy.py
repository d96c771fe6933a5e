"""Who may ask for what: the one table of the gRPC methods. HTTP endpoints name their rule
themselves. What no rule is for is refused."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType

from jaxserve.server.access.tenant import Role


class Access(Enum):
    OPEN = auto()
    """No key is asked for: probes, which tell nothing but whether the server works."""
    ANY_KEY = auto()
    INFERENCE = auto()
    METRICS = auto()
    ADMIN = auto()


ROLES: Mapping[Access, Role | None] = MappingProxyType(
    {
        Access.ANY_KEY: None,
        Access.INFERENCE: Role.INFERENCE,
        Access.METRICS: Role.METRICS,
        Access.ADMIN: Role.ADMIN,
    }
)
"""The role that a key must have; None takes any key."""

GRPC_ACCESS: Mapping[str, Access] = MappingProxyType(
    {
        "/jaxserve.v1.Inference/Generate": Access.INFERENCE,
        "/jaxserve.v1.Inference/Embed": Access.INFERENCE,
        "/jaxserve.v1.Inference/Classify": Access.INFERENCE,
        "/jaxserve.v1.Inference/Tokenize": Access.INFERENCE,
        "/jaxserve.v1.Inference/Abort": Access.INFERENCE,
        "/jaxserve.v1.Control/GetServerInfo": Access.ANY_KEY,
        "/jaxserve.v1.Control/GetModelInfo": Access.ANY_KEY,
        "/jaxserve.v1.Control/GetLoad": Access.METRICS,
        "/jaxserve.v1.Control/LoadAdapter": Access.ADMIN,
        "/jaxserve.v1.Control/UnloadAdapter": Access.ADMIN,
        "/jaxserve.v1.Control/ListAdapters": Access.ADMIN,
        "/grpc.health.v1.Health/Check": Access.OPEN,
        "/grpc.health.v1.Health/Watch": Access.OPEN,
        "/grpc.health.v1.Health/List": Access.OPEN,
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Access.ANY_KEY,
    }
)
