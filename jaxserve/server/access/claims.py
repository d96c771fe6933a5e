"""Claims: a request becomes its tenant's before the engine sees it."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field, replace

from jaxserve.engine.request import Account, GenerationRequest
from jaxserve.server.access.tenant import Tenant

SERVER_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Claims:
    server_key: bytes = field(
        default_factory=lambda: secrets.token_bytes(SERVER_KEY_BYTES), repr=False
    )
    """Nobody can make another tenant's salt without it. New with each start, as the cache is."""

    def claim(
        self, tenant: Tenant, request: GenerationRequest, trace_parent: str = ""
    ) -> GenerationRequest:
        """The request with the tenant's name in its id, so that no other tenant's id is ever the
        same, with the tenant's salt, its class and its share.

        A request of a server that lets anyone in stays as it is, but for `trace_parent`.
        """
        if not tenant.name:
            return replace(request, trace_parent=trace_parent) if trace_parent else request
        return replace(
            request,
            request_id=scoped_id(tenant, request.request_id),
            cache_salt=self._salt(tenant.cache_owner, request.cache_salt),
            priority=tenant.priority,
            trace_parent=trace_parent,
            account=Account(tenant.name, tenant.weight, tenant.cache_owner),
        )

    def _salt(self, owner: str, own_salt: str) -> str:
        # An owner has no NUL, so the two can't be divided in another way.
        message = f"{owner}\0{own_salt}".encode()
        return hmac.new(self.server_key, message, hashlib.sha256).hexdigest()


def scoped_id(tenant: Tenant, request_id: str) -> str:
    """The engine's id of a tenant's request. Names have no slash."""
    return f"{tenant.name}/{request_id}" if tenant.name else request_id
