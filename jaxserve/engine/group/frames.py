"""Frames: what leader and followers send each other over a TCP connection.

A frame is a header of fixed size and a payload: JSON while a group starts, int32 arrays for the
steps. All numbers are little-endian. Nothing is unpickled.
"""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_PAYLOAD_BYTES = 1 << 26
"""Far above the inputs of any step; a longer frame is not ours."""

SLOT_LOAD = 0
"""In place of the rows of a bucket: the program that loads a slot."""
MASK_LOAD = (1 << 32) - 1
"""The program that loads masks."""

_HEADER = struct.Struct("<IIQQ")
"""kind, bytes of the payload, number, rows."""
_MAX_ARRAY_AXES = 4


class FrameError(Exception):
    """The other side does not speak our protocol."""


class Kind(IntEnum):
    """What a frame says. The first five come from the leader."""

    WELCOME = 1
    """JSON: how to join the others."""
    CONFIG = 2
    """JSON: the settings that all processes compile for."""
    PROGRAM = 3
    """An array: run the program of `rows` rows, or `SLOT_LOAD` or `MASK_LOAD`, with it."""
    LEADER_BEAT = 4
    """The leader is there."""
    END = 5
    """The group ends in good order."""
    HELLO = 6
    """JSON: who the follower is."""
    READY = 7
    """JSON: what it has compiled and loaded."""
    BEAT = 8
    """An array: the numbers of the program begun and of the step finished last, and how many
    programs it has compiled since it was ready."""
    FAILED = 9
    """JSON: why it can do no more."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message."""

    kind: Kind
    payload: bytes = b""
    number: int = 0
    """Of a PROGRAM: counts from 1, in the order in which all processes run them."""
    rows: int = 0

    @classmethod
    def of_json(cls, kind: Kind, value: dict[str, Any]) -> Frame:
        """A frame that holds a JSON object."""
        return cls(kind, json.dumps(value).encode())

    @classmethod
    def of_array(
        cls, kind: Kind, array: npt.NDArray[np.int32], number: int = 0, rows: int = 0
    ) -> Frame:
        """A frame that holds an int32 array of up to 4 axes."""
        shape = np.asarray((array.ndim, *array.shape), "<u4")
        return cls(kind, shape.tobytes() + array.astype("<i4", copy=False).tobytes(), number, rows)

    def json(self) -> dict[str, Any]:
        """The payload of `of_json`. Raises FrameError."""
        try:
            value = json.loads(self.payload)
        except ValueError as error:
            raise FrameError(f"{self.kind.name} holds no JSON") from error
        if not isinstance(value, dict):
            raise FrameError(f"{self.kind.name} holds no JSON object")
        return value

    def array(self) -> npt.NDArray[np.int32]:
        """The payload of `of_array`, as a fresh array. Raises FrameError."""
        words = np.frombuffer(self.payload[: len(self.payload) // 4 * 4], "<i4")
        num_axes = int(words[0]) if len(words) else -1
        if not 0 <= num_axes <= _MAX_ARRAY_AXES or len(words) <= num_axes:
            raise FrameError(f"{self.kind.name} holds no array")
        shape, values = words[1 : 1 + num_axes], words[1 + num_axes :]
        if (shape < 0).any() or int(np.prod(shape, dtype=np.int64)) != len(values):
            raise FrameError(f"{self.kind.name} holds {len(values)} numbers for shape {shape}")
        return values.reshape(shape).astype(np.int32)


class FrameSocket:
    """One end of a connection. Any thread may send; one thread receives."""

    def __init__(self, sock: socket.socket) -> None:
        # A step's inputs must not wait for the acknowledgement of the beat before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sock = sock
        self._sending = threading.Lock()

    def send(self, frame: Frame) -> None:
        """Raises OSError: the peer is gone."""
        header = _HEADER.pack(frame.kind, len(frame.payload), frame.number, frame.rows)
        with self._sending:
            self._sock.sendall(header + frame.payload)

    def receive(self) -> Frame | None:
        """The next frame; None at the end of the peer.

        Raises:
            FrameError: it is not of our protocol, or was cut short.
            OSError: the connection broke, or the time set by `set_timeout` is up.
        """
        header = self.receive_bytes(_HEADER.size, may_end=True)
        if header is None:
            return None
        kind, num_bytes, number, rows = _HEADER.unpack(header)
        if kind not in Kind.__members__.values() or num_bytes > MAX_PAYLOAD_BYTES:
            raise FrameError(f"a frame of kind {kind} and {num_bytes} bytes")
        return Frame(Kind(kind), self.receive_bytes(num_bytes) or b"", number, rows)

    def send_bytes(self, data: bytes) -> None:
        """Raises OSError: the peer is gone."""
        with self._sending:
            self._sock.sendall(data)

    def receive_bytes(self, num_bytes: int, *, may_end: bool = False) -> bytes | None:
        """Exactly so many bytes; None at the end of the peer, if it may end here."""
        data = bytearray(num_bytes)
        view = memoryview(data)
        num_received = 0
        while num_received < num_bytes:
            count = self._sock.recv_into(view[num_received:])
            if count == 0:
                if may_end and num_received == 0:
                    return None
                raise FrameError("the connection ended within a message")
            num_received += count
        return bytes(data)

    def set_timeout(self, timeout_s: float | None) -> None:
        """How long to wait for bytes, and for room to send them; None: for ever."""
        self._sock.settimeout(timeout_s)

    def local_host(self) -> str:
        """The address of this end."""
        return str(self._sock.getsockname()[0])

    def close(self) -> None:
        """Ends both directions, also for a thread that waits in `receive`."""
        with contextlib.suppress(OSError):  # The peer may have ended it.
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()
