"""The end of a gRPC port, of which clients learn as of a connection that was closed.

gRPC's core, when it stops, cancels the calls that it has not handed to a handler yet: their clients
see CANCELLED, which means to them that they gave up themselves. A connection that is closed is
UNAVAILABLE, upon which they turn to another server. So what listens and the connections are ended
here before the core stops, by the kernel: what was written before still arrives.
"""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

POLL_S = 0.02
OPEN_FILES = Path("/dev/fd")
"""Of this process, by number."""


async def end_port(port: int, patience_s: float) -> None:
    """Accepts no more connections on `port` and sends no more on those that there are.

    Waits for the clients to close their ends, for `patience_s` at most. Everything that they are
    to read must have been written.
    """
    with _sockets_of(port) as ends:
        for end in ends:
            if end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                # Linux: an end of listening.
                _shut(end, socket.SHUT_RD)
    loop = asyncio.get_running_loop()
    until_s = loop.time() + patience_s
    # Each time anew: one that had just been accepted may show itself late.
    while _half_close(port) and loop.time() < until_s:
        await asyncio.sleep(POLL_S)


def _half_close(port: int) -> int:
    """How many connections are still there."""
    with _sockets_of(port) as ends:
        connections = [
            end for end in ends if not end.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        ]
        return sum(_shut(end, socket.SHUT_WR) for end in connections)


def _shut(end: socket.socket, how: int) -> bool:
    """Whether it was still open."""
    with suppress(OSError):
        end.shutdown(how)
        return True
    return False


@contextmanager
def _sockets_of(port: int) -> Iterator[list[socket.socket]]:
    """This process's TCP sockets whose own port it is, by descriptors that end with the context."""
    names = [int(path.name) for path in OPEN_FILES.iterdir()]
    ends = [end for name in names if (end := _duplicate(name)) is not None]
    try:
        yield [end for end in ends if _is_of(end, port)]
    finally:
        for end in ends:
            end.close()


def _duplicate(descriptor: int) -> socket.socket | None:
    """None if it is closed by now, or no TCP socket."""
    try:
        copy = os.dup(descriptor)
    except OSError:
        return None
    if stat.S_ISSOCK(os.fstat(copy).st_mode):
        end = socket.socket(fileno=copy)
        if end.family in (socket.AF_INET, socket.AF_INET6) and end.type == socket.SOCK_STREAM:
            return end
        end.close()
    else:
        os.close(copy)
    return None


def _is_of(end: socket.socket, port: int) -> bool:
    with suppress(OSError):
        return bool(end.getsockname()[1] == port)
    return False
