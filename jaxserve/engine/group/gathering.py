"""Gathering: the leader's port, and the followers that come to it."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any

import jaxserve
from jaxserve.engine.group.config import GroupConfig, join_address
from jaxserve.engine.group.errors import GroupError
from jaxserve.engine.group.follower_link import FollowerLink, describe_exit
from jaxserve.engine.group.frames import Frame, FrameError, FrameSocket, Kind
from jaxserve.engine.group.handshake import HANDSHAKE_TIMEOUT_S, prove_to_follower
from jaxserve.errors import ConfigError

GATHER_TIMEOUT_S = 300.0
"""How long the processes of a group may take to find each other."""
_POLL_S = 0.1


class Gathering:
    """Listens until every follower is there. Raises ConfigError when the port can't be had."""

    def __init__(self, config: GroupConfig) -> None:
        self._config = config
        family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        try:
            self._listener = socket.create_server(
                (config.host, config.port), family=family, backlog=config.num_processes
            )
        except OSError as error:
            raise ConfigError(
                f"--coordinator {join_address(config.host, config.port)}: this process cannot "
                f"listen there ({error.strerror}); give an address of this host and a free port"
            ) from error
        self._listener.settimeout(_POLL_S)
        self.port: int = self._listener.getsockname()[1]

    def gather(
        self,
        children: Mapping[int, subprocess.Popen[bytes]],
        clock: Callable[[], float],
        timeout_s: float = GATHER_TIMEOUT_S,
    ) -> list[FollowerLink]:
        """Waits for all followers, and listens no more.

        Args:
            children: those that this process has started, by process id.
            clock: for the links.
            timeout_s: how long to wait.

        Raises:
            GroupError: one is missing or has ended, and which.
        """
        links: dict[int, FollowerLink] = {}
        deadline_s = time.monotonic() + timeout_s
        try:
            while missing := set(range(1, self._config.num_processes)) - links.keys():
                _check_children(children)
                if time.monotonic() > deadline_s:
                    names = ", ".join(map(str, sorted(missing)))
                    raise GroupError(
                        f"waited {timeout_s:.0f} s for process {names} of "
                        f"{self._config.num_processes}: start it with --coordinator "
                        f"HOST:{self.port} and the same token, and see what it says"
                    )
                link = self._accept(links, children, clock)
                if link is not None:
                    links[link.process_id] = link
        except BaseException:
            for link in links.values():
                link.close()
            raise
        finally:
            self._listener.close()
        return [links[process_id] for process_id in sorted(links)]

    def close(self) -> None:
        """Listens no more."""
        self._listener.close()

    def _accept(
        self,
        links: Mapping[int, FollowerLink],
        children: Mapping[int, subprocess.Popen[bytes]],
        clock: Callable[[], float],
    ) -> FollowerLink | None:
        """The next follower; None if nobody came, or a stranger did."""
        try:
            sock, _ = self._listener.accept()
        except TimeoutError:
            return None
        connection = FrameSocket(sock)
        try:
            process_id = prove_to_follower(connection, self._config.token)
            connection.set_timeout(HANDSHAKE_TIMEOUT_S)
            frame = connection.receive()
            connection.set_timeout(None)
            if frame is None or frame.kind is not Kind.HELLO:
                raise FrameError("no HELLO")
            hello = frame.json()
        except (FrameError, OSError):
            connection.close()
            return None
        refusal = self._refusal(process_id, hello, links)
        if refusal is not None:
            connection.send(Frame.of_json(Kind.WELCOME, {"refused": refusal}))
            connection.close()
            return None
        return FollowerLink(process_id, connection, hello, children.get(process_id), clock)

    def _refusal(
        self, process_id: int, hello: Mapping[str, Any], links: Mapping[int, FollowerLink]
    ) -> str | None:
        """What a process must mend before it can join."""
        num_processes = self._config.num_processes
        if not 1 <= process_id < num_processes:
            return f"--process-id must be in [1, {num_processes}), not {process_id}"
        if process_id in links:
            return (
                f"process {process_id} is there already ({links[process_id].where}): give every "
                "process another --process-id"
            )
        if hello.get("num_processes") != num_processes:
            return f"--num-processes is {num_processes} here, not {hello.get('num_processes')}"
        theirs, ours = hello.get("versions"), versions()
        if theirs != ours:
            return f"the leader runs {ours}, this process {theirs}: install the same"
        return None


def versions() -> dict[str, str]:
    """What must be the same in all processes, so that they compile the same programs."""
    return {
        "jaxserve": jaxserve.__version__,
        **{name: metadata.version(name) for name in ("jax", "jaxlib", "numpy")},
    }


def _check_children(children: Mapping[int, subprocess.Popen[bytes]]) -> None:
    for process_id, child in children.items():
        code = child.poll()
        if code is not None:
            raise GroupError(
                f"process {process_id} (pid {child.pid}) {describe_exit(code)} before it joined; "
                "what it said is above"
            )
