"""Messages between supervisor, fork server and trainers: JSON over a socket pair.

A packet is one message, so nothing is ever half read; the end of the peer is the end of
the file. File descriptors travel beside a message.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Sequence
from typing import Any

Message = dict[str, Any]
MAX_MESSAGE_BYTES = 1 << 17
MAX_FDS = 8


class Channel:
    """One end of a socket pair."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Two ends that talk to each other."""
        one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (one, other):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_MESSAGE_BYTES)
        return Channel(one), Channel(other)

    @classmethod
    def from_fd(cls, fd: int) -> Channel:
        """An inherited end."""
        return cls(socket.socket(fileno=fd))

    def fileno(self) -> int:
        """For selectors."""
        return self.sock.fileno()

    def send(self, message: Message, fds: Sequence[int] = ()) -> bool:
        """Sends a message. Returns False when the peer has ended.

        Raises:
            BlockingIOError: on a non-blocking end whose peer does not read.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        assert len(data) < MAX_MESSAGE_BYTES, f"a message of {len(data)} bytes"
        try:
            if fds:
                socket.send_fds(self.sock, [data], list(fds))
            else:
                self.sock.send(data)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def receive(self) -> Message | None:
        """The next message; None at the end of the peer."""
        message, _ = self.receive_with_fds()
        return message

    def receive_with_fds(self) -> tuple[Message | None, list[int]]:
        """The next message and the file descriptors that came with it."""
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, MAX_MESSAGE_BYTES, MAX_FDS)
        except ConnectionResetError:
            return None, []
        return (json.loads(data) if data else None), fds

    def close(self) -> None:
        """Ends this side."""
        self.sock.close()
