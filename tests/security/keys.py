"""Keys files for tests, and services that ask for keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from jaxserve.client import Client
from jaxserve.server.access.key_file import key_digest
from tests.server.scripted_service import Service, start_service

KEYS = {name: f"jsk-{name}-" + name[0] * 40 for name in ("alpha", "beta", "watcher")}
"""Key of each tenant; `watcher` may read metrics alone."""


def write_keys(path: Path, **settings: dict[str, Any]) -> Path:
    """A keys file of the tenants in KEYS, with settings by tenant."""
    tables = []
    for name, key in KEYS.items():
        entry = {"name": name, "key_sha256": [key_digest(key)]} | settings.get(name, {})
        if name == "watcher":
            entry.setdefault("roles", ["metrics"])
        tables.append(
            "\n".join(["[[tenants]]", *(f"{k} = {json.dumps(v)}" for k, v in entry.items())])
        )
    replace_file(path, "\n".join(tables))
    return path


def replace_file(path: Path, text: str) -> None:
    """As an operator does who wants no reader to see half of it."""
    new = path.with_suffix(".new")
    new.write_text(text)
    new.chmod(0o600)
    new.replace(path)


def keyed_service(path: Path, *, limits: dict[str, Any] | None = None, **settings: Any) -> Service:
    """A ready service that asks for keys."""
    service = start_service(server_settings={"api_keys_file": path, **settings}, **(limits or {}))
    service.make_ready()
    return service


def client_of(service: Service, tenant: str) -> Client:
    return Client(service.address, api_key=KEYS[tenant])


def bearer(tenant: str) -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS[tenant]}"}
