"""What the bits of a run depend on beside its logical world: versions, flags, hardware."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import jax

from jaxserve.errors import ConfigError
from jaxserve.trainer.world import Difference

PACKAGES = ("jax", "jaxlib", "numpy", "optax", "flax", "ml_dtypes")
"""Distributions whose code takes part in the arithmetic."""
BASE_MODEL = "base_model"
"""Digest of the model that adapters are trained on."""


@dataclass(frozen=True, kw_only=True)
class NumericsFingerprint:
    """Compared before a run goes on: a difference may change bits.

    Attributes:
        packages: version of each of `PACKAGES`.
        xla_flags: XLA's flags that change arithmetic, sorted.
        platform: "cpu", "gpu", ...
        device_kind: the devices' model name as jax has it.
        machine: the processor's architecture, such as "x86_64".
        digests: sha256 in hex of what decides the result but is too long to list, by name.
    """

    packages: Mapping[str, str]
    xla_flags: tuple[str, ...]
    platform: str
    device_kind: str
    machine: str
    digests: Mapping[str, str]

    def differences(self, other: NumericsFingerprint) -> list[Difference]:
        """Fields in which `other` differs, as `packages.jax` and the like."""
        mine, theirs = _flat(self), _flat(other)
        return [
            (name, mine.get(name), theirs.get(name))
            for name in sorted(mine.keys() | theirs.keys())
            if mine.get(name) != theirs.get(name)
        ]

    def to_json(self) -> dict[str, Any]:
        """A value for `world.json`; `from_json` is its inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> NumericsFingerprint:
        """Raises: ConfigError: it was not made by `to_json`."""
        known = {one.name for one in dataclasses.fields(cls)}
        if value.keys() != known:
            odd = sorted(value.keys() ^ known)
            raise ConfigError(f"numerics fingerprint: missing or unknown: {', '.join(odd)}")
        return cls(**{**value, "xla_flags": tuple(value["xla_flags"])})


# How many devices there are, how long to wait and what to print changes no bits.
_FLAGS_WITHOUT_EFFECT = (
    "--xla_force_host_platform_device_count",
    "--xla_dump",
    "--xla_cpu_collective_call",
    "--xla_cpu_collective_timeout",
    "--xla_gpu_executable",
)


def take_fingerprint(
    device: jax.Device, xla_flags: Sequence[str], digests: Mapping[str, str]
) -> NumericsFingerprint:
    """The fingerprint of this process.

    Args:
        device: one of those that compute; all are of one kind.
        xla_flags: as XLA was started with.
        digests: see `NumericsFingerprint`.
    """
    flags = {flag for flag in xla_flags if not flag.startswith(_FLAGS_WITHOUT_EFFECT)}
    return NumericsFingerprint(
        packages={name: metadata.version(name) for name in PACKAGES},
        xla_flags=tuple(sorted(flags)),
        platform=device.platform,
        device_kind=device.device_kind,
        machine=platform.machine(),
        digests=dict(digests),
    )


def _flat(value: NumericsFingerprint) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, held in dataclasses.asdict(value).items():
        if isinstance(held, dict):
            flat |= {f"{name}.{key}": one for key, one in held.items()}
        else:
            flat[name] = held
    return flat
