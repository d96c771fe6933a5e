"""How processes that compute together join `jax.distributed`, in training and in serving."""

from __future__ import annotations

import os
import socket

COLLECTIVE_WARN_S = 30
COLLECTIVE_END_S = 1800
"""XLA ends a process whose collective waits so long. Ours are the watchdogs of the supervisor and
of the leader, which are quicker; XLA's own limit of 40 s would hit devices that share few cores."""

HEARTBEAT_TIMEOUT_S = 100
"""Of JAX's coordination service. Our own ties see a death at once; this is a last resort."""

_OWN_FLAGS = {
    "--xla_cpu_collective_call_warn_stuck_timeout_seconds": COLLECTIVE_WARN_S,
    "--xla_cpu_collective_call_terminate_timeout_seconds": COLLECTIVE_END_S,
}


def with_collective_limits(xla_flags: str) -> str:
    """The value of XLA_FLAGS to start a process with.

    Args:
        xla_flags: the starter's own; what it already sets is kept.
    """
    given = xla_flags.split()
    names = {flag.partition("=")[0] for flag in given}
    own = [f"{name}={value}" for name, value in _OWN_FLAGS.items() if name not in names]
    return " ".join([*given, *own])


def limit_collectives() -> None:
    """Sets `with_collective_limits` for this process, which has not started JAX yet."""
    os.environ.update(limited_environment())


def limited_environment() -> dict[str, str]:
    """This process's environment with `with_collective_limits`, to start another with."""
    return {**os.environ, "XLA_FLAGS": with_collective_limits(os.environ.get("XLA_FLAGS", ""))}


def free_port(host: str = "127.0.0.1") -> int:
    """A port of this interface that nobody uses at this moment."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def join(
    coordinator: str,
    process_id: int,
    num_processes: int,
    *,
    num_cpu_devices: int | None = None,
    heartbeat_timeout_s: int = HEARTBEAT_TIMEOUT_S,
) -> None:
    """Joins the others, before any device is touched; returns when all are connected.

    Args:
        coordinator: HOST:PORT of process 0's coordination service.
        process_id: which of how many processes this one is.
        num_processes: at least 2.
        num_cpu_devices: devices that a CPU is divided into; None leaves that to JAX's config.
        heartbeat_timeout_s: silence after which JAX ends all processes, a pause of the whole
            machine included.

    Raises:
        RuntimeError: the others did not come.
    """
    import jax

    if num_cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", num_cpu_devices)
    # Its handler of SIGTERM would replace ours, and stops processes only between steps.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        coordinator_address=coordinator,
        # Else the service listens on every interface of the machine.
        coordinator_bind_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        heartbeat_timeout_seconds=heartbeat_timeout_s,
    )
    _have_all_keep_programs()
    _connect_all()


def _have_all_keep_programs() -> None:
    """JAX lets process 0 alone write its cache. A program's key has the number of its device,
    so all others would compile everything again at each start."""
    import jax
    from jax._src import distributed

    jax.devices()  # The client is made, and knows its process; nothing but the cache asks now.
    distributed.global_state.process_id = 0


def _connect_all() -> None:
    """Has all processes connect now, while they are abreast: Gloo gives them 30 s, and the
    first step compiles at different speeds."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("connect")
