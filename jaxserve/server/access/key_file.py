"""The keys file: tenants, digests of their keys, and their limits, as TOML.

    [[tenants]]
    name = "search"
    key_sha256 = ["9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"]
    tokens_per_minute = 60000

Keys are 256 random bits, so a plain SHA-256 of one tells nothing of it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from jaxserve.errors import ConfigError
from jaxserve.server.access.tenant import Tenant

KEY_PREFIX = "jsk-"
KEY_BYTES = 32
MAX_FILE_BYTES = 1 << 20
MAX_TENANTS = 1000
"""Each is a label of metrics, and each key is compared with every one that comes."""
MAX_CACHE_SHARE = 0.5
"""Of all tenants together; the rest of the cache belongs to whoever runs."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Tenants:
    """The tenants of one version of the file."""

    def __init__(self, tenants: tuple[Tenant, ...]) -> None:
        self.by_name: Mapping[str, Tenant] = {tenant.name: tenant for tenant in tenants}
        self._keys = [
            (bytes.fromhex(digest), tenant) for tenant in tenants for digest in tenant.key_sha256
        ]

    def of_key(self, key: str) -> Tenant | None:
        """Whose key it is. The time taken says nothing about the keys that exist."""
        digest = hashlib.sha256(key.encode()).digest()
        found = None
        for known, tenant in self._keys:
            if hmac.compare_digest(known, digest):
                found = tenant
        return found

    def cache_shares(self) -> dict[str, float]:
        """Part of the cache that each owner keeps, of those that keep some."""
        shares: dict[str, float] = {}
        for tenant in self.by_name.values():
            if tenant.cache_share:
                owner = tenant.cache_owner
                shares[owner] = shares.get(owner, 0.0) + tenant.cache_share
        return shares


def new_key() -> str:
    """A key that nobody has."""
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def key_digest(key: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(key.encode()).hexdigest()


def read_key_file(path: Path) -> Tenants:
    """Raises ConfigError that names the file and what is wrong in it."""
    try:
        raw = _read(path)
        return _checked(tomllib.loads(raw.decode()))
    except OSError as error:
        raise ConfigError(f"--api-keys-file {path}: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"--api-keys-file {path}: is no TOML: {error}") from None
    except (UnicodeDecodeError, RecursionError):
        raise ConfigError(f"--api-keys-file {path}: is no TOML") from None
    except _Mistake as mistake:
        raise ConfigError(f"--api-keys-file {path}: {mistake}") from None


class _Mistake(Exception):
    """In the file's content."""


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tenants: tuple[Tenant, ...]


def _read(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with os.fdopen(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _Mistake("is no regular file")
        if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise _Mistake("others may write it, and so let themselves in: chmod go-w it")
        if found.st_size > MAX_FILE_BYTES:
            raise _Mistake(f"has more than {MAX_FILE_BYTES} bytes")
        return file.read(MAX_FILE_BYTES + 1)


def _checked(content: Mapping[str, object]) -> Tenants:
    try:
        # By way of JSON, whose lists pydantic takes for tuples also when it is strict.
        tenants = _File.model_validate_json(json.dumps(content, default=str)).tenants
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise _Mistake(f"{where}: {first['msg']}") from None
    if not tenants:
        raise _Mistake("names no tenants: nobody could send a request")
    if len(tenants) > MAX_TENANTS:
        raise _Mistake(f"has {len(tenants)} tenants; at most {MAX_TENANTS} are allowed")
    for tenant in tenants:
        _check_tenant(tenant)
    _check_unique("name", [tenant.name for tenant in tenants])
    _check_unique("key", [digest for tenant in tenants for digest in tenant.key_sha256])
    total = sum(tenant.cache_share for tenant in tenants)
    if total > MAX_CACHE_SHARE:
        raise _Mistake(f"cache_share of all tenants is {total:g}; at most {MAX_CACHE_SHARE:g}")
    return Tenants(tenants)


def _check_tenant(tenant: Tenant) -> None:
    for field in ("name", "cache_group"):
        value = getattr(tenant, field)
        if value is not None and not _NAME.fullmatch(value):
            raise _Mistake(
                f"{field} {value[:80]!r} must be 1 to 64 letters, digits, dots, dashes or "
                "underscores and begin with a letter or a digit"
            )
    if not tenant.key_sha256:
        raise _Mistake(f"{tenant.name} has no key_sha256: `jaxserve keys new` makes a key")
    if tenant.burst_tokens is not None and tenant.tokens_per_minute is None:
        raise _Mistake(f"{tenant.name}: burst_tokens needs tokens_per_minute")


def _check_unique(what: str, values: list[str]) -> None:
    value, count = Counter(values).most_common(1)[0]
    if count > 1:
        raise _Mistake(f"{what} {value} is there {count} times")
