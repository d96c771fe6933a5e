"""FollowerLink: the leader's end of its connection to one follower."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import threading
from collections.abc import Callable, Mapping
from typing import Any

from jaxserve.engine.group.frames import Frame, FrameError, FrameSocket, Kind
from jaxserve.engine.group.liveness import Signs

_EXIT_CODE_WAIT_S = 1.0
"""For the exit code of a child whose connection has ended."""


class FollowerLink:
    """A follower that has proved itself. A thread of its own reads what it says.

    Args:
        process_id: which one.
        connection: after the handshake.
        hello: what it said of itself: `host` and `pid`.
        child: its process, if this one has started it.
        clock: the leader's `AwakeClock`, read only.
    """

    def __init__(
        self,
        process_id: int,
        connection: FrameSocket,
        hello: Mapping[str, Any],
        child: subprocess.Popen[bytes] | None,
        clock: Callable[[], float],
    ) -> None:
        self.process_id = process_id
        self.where = f"{hello.get('host')}, pid {hello.get('pid')}"
        self.ready: Mapping[str, Any] | None = None
        self.is_ready = threading.Event()
        self.num_compiles = 0
        """Programs that it has compiled since it was ready."""
        self._connection = connection
        self._child = child
        self._clock = clock
        self._heard_s = clock()
        self._begun = self._finished = 0
        self._ended: str | None = None
        self._failure: str | None = None
        self._failed_s = 0.0
        self._reader = threading.Thread(
            target=self._read, name=f"jaxserve-follower-{process_id}", daemon=True
        )

    def start(self) -> None:
        """Begins to read."""
        self._reader.start()

    def send(self, frame: Frame) -> None:
        """Sends a frame; nothing happens if the follower is gone, which its signs tell."""
        with contextlib.suppress(OSError):
            self._connection.send(frame)

    def signs(self) -> Signs:
        """What is known of it now."""
        if self._child is not None and self._ended is None and self._child.poll() is not None:
            self._ended = describe_exit(self._child.returncode)
        return Signs(
            process_id=self.process_id,
            where=self.where,
            heard_s=self._heard_s,
            begun=self._begun,
            finished=self._finished,
            ended=self._ended,
            failure=self._failure,
            failed_s=self._failed_s,
        )

    def join(self, timeout_s: float) -> None:
        """Waits until the follower has ended its connection."""
        self._reader.join(timeout_s)

    def close(self) -> None:
        """Ends the connection, and with it the follower."""
        self._connection.close()

    def _read(self) -> None:
        try:
            while (frame := self._connection.receive()) is not None:
                self._heard_s = self._clock()
                self._take(frame)
            how = "has ended its connection"
        except FrameError as error:
            how = f"sent what no follower sends ({error})"
        except OSError as error:
            how = f"has lost its connection ({error.strerror})"
        self._ended = self._ended or self._exit_of_child() or how

    def _take(self, frame: Frame) -> None:
        if frame.kind is Kind.BEAT:
            begun, finished, num_compiles = frame.array().tolist()
            self._begun, self._finished, self.num_compiles = begun, finished, num_compiles
        elif frame.kind is Kind.READY:
            self.ready = frame.json()
            self.is_ready.set()
        elif frame.kind is Kind.FAILED:
            self._failed_s = self._clock()
            self._failure = str(frame.json().get("why"))
        else:
            raise FrameError(f"a frame {frame.kind.name}")

    def _exit_of_child(self) -> str | None:
        """A process's end is more telling than that of its connection."""
        if self._child is None:
            return None
        try:
            return describe_exit(self._child.wait(_EXIT_CODE_WAIT_S))
        except subprocess.TimeoutExpired:
            return None


def describe_exit(code: int) -> str:
    """How a process ended, in words."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (out of memory?)" if -code == signal.SIGKILL else "")
