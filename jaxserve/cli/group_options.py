"""What `jaxserve serve` is told about the other processes that serve the same model."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from pathlib import Path

from jaxserve.engine.group.config import GroupConfig, parse_address, read_token
from jaxserve.errors import ConfigError

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class GroupOptions:
    """The options as they were given; see `jaxserve serve --help`."""

    processes: int
    coordinator: str | None
    process_id: int | None
    num_processes: int | None
    token_file: Path | None
    follower_timeout_s: float

    def config(self) -> GroupConfig | None:
        """The group; None for one process. Raises ConfigError naming the option to change."""
        if self.coordinator is None:
            return self._local()
        if self.processes != 1:
            raise ConfigError("give --processes for one host, or --coordinator for several")
        needed = {
            "--process-id": self.process_id,
            "--num-processes": self.num_processes,
            "--group-token-file": self.token_file,
        }
        if missing := [flag for flag, value in needed.items() if value is None]:
            raise ConfigError(f"--coordinator needs {' and '.join(missing)}")
        assert self.process_id is not None
        assert self.num_processes is not None
        assert self.token_file is not None
        host, port = parse_address(self.coordinator)
        return GroupConfig(
            num_processes=self.num_processes,
            process_id=self.process_id,
            host=host,
            port=port,
            token=read_token(self.token_file),
            follower_timeout_s=self.follower_timeout_s,
        )

    def _local(self) -> GroupConfig | None:
        for flag, value in (
            ("--process-id", self.process_id),
            ("--num-processes", self.num_processes),
            ("--group-token-file", self.token_file),
        ):
            if value is not None:
                raise ConfigError(f"{flag} is for several hosts and needs --coordinator")
        if self.processes == 1:
            return None
        if self.processes < 1:
            raise ConfigError(f"--processes must be at least 1, not {self.processes}")
        return GroupConfig(
            num_processes=self.processes,
            process_id=0,
            host=_LOOPBACK,
            port=0,
            token=secrets.token_hex(32).encode(),
            follower_timeout_s=self.follower_timeout_s,
        )
