"""`jaxserve serve` in several processes: the leader's seat, and the follower."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, NoReturn

import typer

from jaxserve.cli.local_followers import start_followers
from jaxserve.distributed import limit_collectives
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.group.config import GroupConfig, join_address
from jaxserve.engine.group.gathering import Gathering
from jaxserve.engine.hung_device import leave_at_once
from jaxserve.errors import ConfigError
from jaxserve.server.config import ServerConfig

if TYPE_CHECKING:
    from rich.console import Console

    from jaxserve.engine.group.leader import Leader
    from jaxserve.engine.group.liveness import Loss

_FLAGS = {
    "allowed_hosts": "allowed_host",
    "pacing": "flush-ms, --flush-tokens, --pad-bytes or --strict-pacing",
    "prefix_caching": "no_prefix_caching",
    "tls": "tls_certificate",
}
"""Fields of configs whose flags have other names."""


@dataclass(frozen=True, slots=True)
class LeaderSeat:
    """What the leader has before JAX is there: its port, and the followers that it started."""

    config: GroupConfig
    gathering: Gathering
    children: Mapping[int, subprocess.Popen[bytes]]

    @classmethod
    def take(cls, config: GroupConfig, engine_config: EngineConfig) -> LeaderSeat:
        """To be called in the main thread, with which the followers end."""
        gathering = Gathering(config)
        is_local = config.port == 0
        children = start_followers(config, gathering.port, engine_config) if is_local else {}
        return cls(config, gathering, children)

    def leader(self, on_loss: Callable[[Loss], None]) -> Leader:
        """Imports JAX."""
        from jaxserve.engine.group.leader import Leader

        return Leader(self.config, self.gathering, self.children, on_loss)


def run_leader(serve: Callable[[], int]) -> NoReturn:
    """Runs `serve` and ends the process with the exit code that it returns.

    JAX would wait at its end for all other processes, one of which may be lost.
    """
    _keep_stdout()
    limit_collectives()
    _end_with(serve)


def check_follower_options(
    process_id: int, engine_config: EngineConfig, server_config: ServerConfig
) -> None:
    """Raises ConfigError for an option that no follower acts on: it has a model and a cache of
    its own, and gets all else from the leader."""
    own = EngineConfig(
        model=engine_config.model, compilation_cache_dir=engine_config.compilation_cache_dir
    )
    for given, unset in ((engine_config, own), (server_config, ServerConfig())):
        for field in fields(given):
            if getattr(given, field.name) != getattr(unset, field.name):
                flag = f"--{_FLAGS.get(field.name, field.name).replace('_', '-')}"
                raise ConfigError(
                    f"{flag} is for process 0, which tells the others: leave it out for "
                    f"process {process_id}"
                )


def run_follower(group: GroupConfig, engine_config: EngineConfig, console: Console) -> NoReturn:
    """Follows the leader until it ends the group, and ends the process."""
    where = join_address(group.host, group.port)

    def run() -> int:
        from jaxserve.engine.group.follower import follow
        from jaxserve.engine.group.start import FollowerStart

        start = FollowerStart(engine_config, group.process_id)

        def begin(settings: Mapping[str, Any]) -> Any:
            # From now on this process ends with its leader, which drains at a SIGTERM to all.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            return start(settings)

        console.print(f"process {group.process_id} of {group.num_processes} follows {where}")
        follow(group, begin)
        return 0

    _end_with(run)


def _end_with(run: Callable[[], int]) -> NoReturn:
    from jaxserve.cli.main import is_user_error, user_message

    try:
        leave_at_once(run())
    except typer.Exit as end:
        leave_at_once(end.exit_code)
    except Exception as error:
        if not is_user_error(error):
            traceback.print_exc()
            leave_at_once(1)
        typer.secho(f"error: {user_message(error)}", fg=typer.colors.RED, err=True)
        leave_at_once(2)


def _keep_stdout() -> None:
    """Leaves standard output to what this program prints itself: Gloo writes there, too."""
    sys.stdout.flush()
    ours = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    sys.stdout = os.fdopen(ours, "w")
