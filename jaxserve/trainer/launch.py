"""How trainers are started: the one place that sets flags of XLA and of the environment.

Everything here must be the same for all devices' counts, since flags change bits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.distributed import join, with_collective_limits
from jaxserve.trainer.allocator import allocator_environment


@dataclass(frozen=True)
class Place:
    """A trainer's place in its generation.

    Attributes:
        rank, num_processes: which of how many processes.
        devices_per_process: devices of each; virtual ones on a CPU.
        coordinator: HOST:PORT of process 0's coordination service, new in each generation.
        compilation_cache_dir: where compiled programs are kept.
    """

    rank: int
    num_processes: int
    devices_per_process: int
    coordinator: str
    compilation_cache_dir: str

    def to_json(self) -> dict[str, Any]:
        """Its fields as JSON values."""
        return dict(vars(self))


def child_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment of the fork server and so of all trainers."""
    return {
        **environment,
        **allocator_environment(environment),
        "XLA_FLAGS": with_collective_limits(environment.get("XLA_FLAGS", "")),
        # A process that forks must have one thread; trainers compute in XLA's threads.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def set_up_jax(place: Place) -> None:
    """Configures JAX in a trainer, before any device is touched, and joins its generation.

    Raises:
        ConfigError: the compilation cache cannot be used.
        RuntimeError: the other processes of the generation did not come.
    """
    import jax

    from jaxserve.engine.compilation import use_compilation_cache

    # JAX writes entries in place, and programs of several processes have the same keys.
    programs = Path(place.compilation_cache_dir)
    use_compilation_cache(programs)
    if place.rank:
        use_compilation_cache(programs / f"rank-{place.rank}")
    jax.config.update("jax_num_cpu_devices", place.devices_per_process)
    if place.num_processes > 1:
        join(place.coordinator, place.rank, place.num_processes)


def xla_flags() -> list[str]:
    """The flags that XLA was started with in this process."""
    return environment_now().get("XLA_FLAGS", "").split()


def environment_now() -> dict[str, str]:
    """This process's environment."""
    return {**os.environ}
