"""Versions below which a package has a known hole that a client could reach."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from importlib import metadata
from types import MappingProxyType

from jaxserve.errors import ConfigError

FLOORS: Mapping[str, str] = MappingProxyType(
    {
        "jinja2": "3.1.6",  # Ways out of the sandbox.
        "grpcio": "1.85.1",
        "protobuf": "7.35.1",  # Bounds the depth of nested messages.
        "httptools": "0.9",  # llhttp 9.4: what is malformed in heads and chunks is refused.
        "starlette": "1.0",
        "uvicorn": "0.54",
        "pydantic": "2.12",
        "safetensors": "0.5",
        "tokenizers": "0.21",
    }
)


def check_floors(installed: Callable[[str], str] = metadata.version) -> None:
    """Raises ConfigError naming each package that is too old.

    Args:
        installed: the version of a package.
    """
    old = []
    for name, floor in FLOORS.items():
        version = installed(name)
        if _release(version) < _release(floor):
            old.append(f"{name} {version} (needs {floor})")
    if old:
        raise ConfigError(
            f"packages with known holes are installed: {', '.join(old)}: upgrade them"
        )


def _release(version: str) -> tuple[int, ...]:
    """The numbers of `1.2.3rc1`; a later part that is absent counts as 0."""
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    return (*parts, 0, 0, 0, 0)[:4]
