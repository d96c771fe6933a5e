"""KeyRing: the tenants that may send requests now."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from jaxserve.errors import ConfigError, Forbidden, Unauthenticated
from jaxserve.server.access.key_file import Tenants, read_key_file
from jaxserve.server.access.policy import ROLES, Access
from jaxserve.server.access.tenant import ANYONE, Tenant
from jaxserve.server.access.watched_files import WatchedFiles

_log = logging.getLogger(__name__)

AUTHORIZATION_KEY = "authorization"


class KeyRing:
    """Of a server with a keys file, or of one that lets anyone in.

    The tenants are one value that is exchanged as a whole, so that no request sees half of a
    change. Used on the event loop alone.

    Args:
        path: of the keys file; None lets anyone in. Raises ConfigError if it cannot be used.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._files = WatchedFiles(() if path is None else (path,))
        self._tenants = None if path is None else read_key_file(path)
        self._take: Callable[[Tenants], None] = lambda _: None
        self.num_failed_reloads = 0

    @property
    def asks_for_keys(self) -> bool:
        return self._tenants is not None

    @property
    def tenants(self) -> Mapping[str, Tenant]:
        """By name; none on a server that lets anyone in."""
        return {} if self._tenants is None else self._tenants.by_name

    def hand_over(self, take: Callable[[Tenants], None]) -> None:
        """Gives the tenants to `take` now and after each change. It raises ConfigError to
        refuse them, which a change does not survive."""
        if self._tenants is not None:
            take(self._tenants)
        self._take = take

    def authorize(self, access: Access | None, authorization: str | None) -> Tenant:
        """Who asks.

        Args:
            access: the rule of what is asked for; None is allowed to nobody.
            authorization: `Bearer KEY`, as the client sent it.

        Raises Unauthenticated, or Forbidden if the key is not good for this.
        """
        if access is Access.OPEN or self._tenants is None:
            return ANYONE
        tenant = self._tenant_of(authorization, self._tenants)
        if access is None:
            raise Forbidden("this is for nobody")
        role = ROLES[access]
        if role is not None and role not in tenant.roles:
            raise Forbidden(f"this needs a key with the role {role}")
        return tenant

    def _tenant_of(self, authorization: str | None, tenants: Tenants) -> Tenant:
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise Unauthenticated("an API key is needed: send `authorization: Bearer KEY`")
        tenant = tenants.of_key(key.strip())
        if tenant is None:
            raise Unauthenticated("this API key is not known here")
        return tenant

    def reload_if_changed(self) -> None:
        """Takes a changed file. One that is bad changes nothing, and the log says so."""
        if self._path is None or not self._files.changed():
            return
        try:
            tenants = read_key_file(self._path)
            self._take(tenants)
        except ConfigError as error:
            _log.error("the API keys stay as they were: %s", error)
            self.num_failed_reloads += 1  # Whoever sees it finds the reason in the log.
            return
        self._tenants = tenants
        _log.warning("API keys of %d tenants were read anew", len(tenants.by_name))
