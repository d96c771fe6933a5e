"""Tenant: who sends a request, and what that one may use."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_PRIORITY = 9


class Role(StrEnum):
    """What a key is good for."""

    INFERENCE = "inference"
    """Text, embeddings, tokens; aborting one's own requests."""
    METRICS = "metrics"
    """What all tenants together do: `/metrics` and GetLoad."""
    ADMIN = "admin"
    """Which adapters are loaded."""


KeyDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


class Tenant(BaseModel):
    """An entry of the keys file. A limit that is absent does not exist."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    name: str
    """In logs and metrics."""
    key_sha256: tuple[KeyDigest, ...] = ()
    """SHA-256 of each key, in hex; two while one takes over from the other."""
    roles: frozenset[Role] = frozenset({Role.INFERENCE})
    weight: float = Field(default=1.0, ge=0.01, le=100.0)
    """Of its share, when several tenants wait."""
    priority: int = Field(default=0, ge=0, le=MAX_PRIORITY)
    """Class of its requests: lower ones go first, and are preempted last."""
    tokens_per_minute: Count | None = None
    """Of prompts and answers together."""
    burst_tokens: Count | None = None
    """Tokens that may be used at once after a pause. Absent: those of a minute."""
    max_concurrent_requests: Count | None = None
    """Requests that have begun and not ended, waiting ones included."""
    max_queued_requests: Count | None = None
    """Of these, the ones that have no token yet."""
    cache_group: str | None = None
    """Tenants of one group share computed prefixes. Absent: nobody sees this tenant's."""
    cache_share: float = Field(default=0.0, ge=0.0, le=0.5)
    """Part of the KV cache that keeps its prefixes against all others."""

    @property
    def cache_owner(self) -> str:
        """Whose prefixes its requests find, and whose part of the cache they fill."""
        if self.cache_group is not None:
            return f"group {self.cache_group}"
        return f"tenant {self.name}" if self.name else ""


ANYONE = Tenant(name="", roles=frozenset(Role))
"""Whoever sends requests to a server without keys."""
