"""GroupConfig: which process of a group this is, and how it finds the others."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from jaxserve.errors import ConfigError

LEADER_ID = 0
MIN_TOKEN_BYTES = 16
MAX_TOKEN_BYTES = 4096
DEFAULT_FOLLOWER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class GroupConfig:
    """Processes that serve one model together. Process 0 leads: it has the clients and the
    scheduler; the others follow. Validated on construction; a message names the flag to change."""

    num_processes: int
    process_id: int
    host: str
    """Where the leader listens for followers."""
    port: int
    """0 picks a free one, for a leader that starts its followers itself."""
    token: bytes = field(repr=False)
    """The secret that all processes of the group share."""
    follower_timeout_s: float = DEFAULT_FOLLOWER_TIMEOUT_S
    """A process that gives no sign of life for this long is lost, and the group with it."""

    def __post_init__(self) -> None:
        if self.num_processes < 2:
            raise ConfigError(f"--num-processes must be at least 2, not {self.num_processes}")
        if not 0 <= self.process_id < self.num_processes:
            raise ConfigError(
                f"--process-id must be in [0, {self.num_processes}), not {self.process_id}"
            )
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--coordinator has port {self.port}; it must be 1 to 65535")
        if not 1 <= self.follower_timeout_s < float("inf"):
            raise ConfigError(
                f"--follower-timeout-s must be at least 1, not {self.follower_timeout_s:g}"
            )
        if len(self.token) < MIN_TOKEN_BYTES:
            raise ConfigError(
                f"the group's token has {len(self.token)} bytes; make one of {MIN_TOKEN_BYTES} or "
                "more, such as by `openssl rand -hex 32`"
            )


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of "HOST:PORT" or "[IPV6]:PORT". Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"--coordinator must be HOST:PORT, such as 10.0.0.1:50100, not {text!r}")
    return host, int(port)


def join_address(host: str, port: int) -> str:
    """HOST:PORT, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def read_token(path: Path) -> bytes:
    """The secret in a file that its owner alone can read. Raises ConfigError otherwise."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            token = file.read(MAX_TOKEN_BYTES).strip()
    except OSError as error:
        raise ConfigError(
            f"--group-token-file {path} cannot be read ({error.strerror}); make it by "
            "`(umask 077; openssl rand -hex 32 > FILE)` and copy it to every host"
        ) from error
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
        raise ConfigError(f"--group-token-file {path} must be a file that you own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"--group-token-file {path} is a secret and open to others; run: chmod 600 {path}"
        )
    return token
