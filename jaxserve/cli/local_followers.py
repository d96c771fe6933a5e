"""Followers on this host, as children of the leader."""

from __future__ import annotations

import os
import subprocess
import sys

from jaxserve.distributed import limited_environment
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.group.config import GroupConfig, join_address


def start_followers(
    group: GroupConfig, port: int, engine_config: EngineConfig
) -> dict[int, subprocess.Popen[bytes]]:
    """Starts all followers of a group on this host, as children with which they end.

    To be called in a thread that lives as long as the process.
    """
    token_fd = _secret_file(group.token)
    environment = limited_environment()
    try:
        return {
            process_id: subprocess.Popen(  # noqa: S603 -- our own module
                _command(group, process_id, port, token_fd, engine_config),
                pass_fds=[token_fd],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=sys.stderr.fileno(),  # The leader's stdout is for its READY line.
                start_new_session=True,  # Ctrl-C is for the leader.
            )
            for process_id in range(1, group.num_processes)
        }
    finally:
        os.close(token_fd)


def _command(
    group: GroupConfig, process_id: int, port: int, token_fd: int, engine_config: EngineConfig
) -> list[str]:
    command = [sys.executable, "-P", "-m", "jaxserve.cli.tied_process", str(os.getpid()), "serve"]
    options = {
        "--model": engine_config.model,
        "--coordinator": join_address(group.host, port),
        "--process-id": process_id,
        "--num-processes": group.num_processes,
        "--group-token-file": f"/proc/self/fd/{token_fd}",
        "--follower-timeout-s": group.follower_timeout_s,
        "--compilation-cache-dir": engine_config.compilation_cache_dir,
    }
    for option, value in options.items():
        if value is not None:
            command += [option, str(value)]
    return command


def _secret_file(secret: bytes) -> int:
    """A file in memory, without a name, that only its owner can read; `read_token` takes it."""
    fd = os.memfd_create("jaxserve-group-token")
    os.fchmod(fd, 0o600)
    os.write(fd, secret)
    return fd
