"""How trainers are started: the one place that sets flags of XLA and of the environment.

Everything here must be the same for all devices' counts, since flags change bits.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.trainer.allocator import allocator_environment

COLLECTIVE_WARN_S = 30
COLLECTIVE_END_S = 1800
"""XLA ends a process whose collective waits so long. Ours is the supervisor's watchdog, which
is quicker; XLA's own limit of 40 s would hit devices that share few cores."""

HEARTBEAT_TIMEOUT_S = 100
"""Of the coordination service. The supervisor sees a death at once; this is a last resort."""

_OWN_FLAGS = {
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": COLLECTIVE_WARN_S,
    "--xla_cpu_collective_call_terminate_timeout_seconds": COLLECTIVE_END_S,
}


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
    given = environment.get("XLA_FLAGS", "").split()
    names = {flag.partition("=")[0] for flag in given}
    own = [f"{name}={value}" for name, value in _OWN_FLAGS.items() if name not in names]
    return {
        **environment,
        **allocator_environment(environment),
        "XLA_FLAGS": " ".join([*given, *own]),
        # A process that forks must have one thread; trainers compute in XLA's threads.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONFAULTHANDLER": "1",
    }


def free_port() -> int:
    """A port of the loopback interface that nobody uses at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    # Its handler of SIGTERM would replace ours, and stops ranks only between steps.
    jax.config.update("jax_enable_preemption_service", False)
    if place.num_processes > 1:
        jax.distributed.initialize(
            coordinator_address=place.coordinator,
            num_processes=place.num_processes,
            process_id=place.rank,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
        _have_all_keep_programs()
        _connect_all()


def _have_all_keep_programs() -> None:
    """JAX lets process 0 alone write its cache. A program's key has the number of its device,
    so all others would compile everything again at each recovery."""
    import jax
    from jax._src import distributed

    jax.devices()  # The client is made, and knows its process; nothing but the cache asks now.
    distributed.global_state.process_id = 0


def _connect_all() -> None:
    """Has all processes connect now, while they are abreast: Gloo gives them 30 s, and the
    first step compiles at different speeds."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("connect")


def xla_flags() -> list[str]:
    """The flags that XLA was started with in this process."""
    return environment_now().get("XLA_FLAGS", "").split()


def environment_now() -> dict[str, str]:
    """This process's environment."""
    return {**os.environ}
