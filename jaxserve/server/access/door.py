"""Door: what decides who may send requests, and how many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxserve.errors import NotFound
from jaxserve.server.access.claims import Claims, scoped_id
from jaxserve.server.access.key_ring import KeyRing
from jaxserve.server.access.meter import TenantMeter, TenantUsage
from jaxserve.server.access.tenant import Tenant
from jaxserve.server.state import ServerState, Serving


@dataclass(frozen=True, slots=True)
class Door:
    ring: KeyRing
    meter: TenantMeter
    claims: Claims = field(default_factory=Claims)

    @classmethod
    def of(cls, ring: KeyRing, state: ServerState) -> Door:
        """A door on the server's clock."""
        # The state's clock is looked up each time, since it can be exchanged.
        clock = lambda: state.clock()  # noqa: E731, PLW0108
        return cls(ring, TenantMeter(lambda: ring.tenants, clock))

    def open_to(self, serving: Serving) -> None:
        """The engine keeps to the tenants' limits from now on. Raises ConfigError if it cannot."""
        self.ring.hand_over(lambda tenants: serving.engine.share_cache(tenants.cache_shares()))
        serving.async_engine.meter_with(self.meter)

    @property
    def usage(self) -> Mapping[str, TenantUsage]:
        """Of each tenant that has sent a request."""
        return self.meter.usage

    def running_id(self, serving: Serving, tenant: Tenant, request_id: str) -> str:
        """The engine's id of the tenant's own request. Raises NotFound on a server with keys,
        whether the request has ended, never was, or is another's."""
        own = scoped_id(tenant, request_id)
        if tenant.name and not serving.async_engine.has(own):
            raise NotFound("no request of yours that runs or waits has this id")
        return own
