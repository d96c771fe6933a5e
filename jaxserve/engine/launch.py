"""How JAX is started for serving: the one place that sets its devices and flags.

Only before the first device is asked for can this be chosen.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import jax

from jaxserve.distributed import with_collective_limits
from jaxserve.errors import ConfigError


def start_devices(num_virtual: int | None = None) -> Sequence[jax.Device]:
    """All devices of this process.

    Args:
        num_virtual: devices that a CPU is divided into; None leaves it whole.

    Raises:
        ConfigError: there is an accelerator, or JAX has started with another number.
    """
    if num_virtual is not None:
        _divide_cpu(num_virtual)
    return jax.devices()


def _divide_cpu(num_devices: int) -> None:
    # XLA reads them when it starts. Devices that share few cores wait long for each other.
    os.environ["XLA_FLAGS"] = with_collective_limits(os.environ.get("XLA_FLAGS", ""))
    with contextlib.suppress(RuntimeError):  # It has started; perhaps as it should be.
        jax.config.update("jax_num_cpu_devices", num_devices)
    platform = jax.default_backend()
    if platform != "cpu":
        raise ConfigError(
            f"--virtual-devices divides a CPU, and JAX runs on {platform}: leave it out, or set "
            "JAX_PLATFORMS=cpu"
        )
    if len(jax.devices()) != num_devices:
        raise ConfigError(
            f"--virtual-devices {num_devices} comes too late: JAX has started with "
            f"{len(jax.devices())} devices in this process"
        )
