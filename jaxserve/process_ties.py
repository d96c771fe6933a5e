"""What ties a child to its parent, and how a process is ended for certain. Linux only."""

from __future__ import annotations

import ctypes
import os
import select
import signal
import time

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Has the kernel kill this process when the thread that forked it ends.

    Args:
        parent_pid: who is to be the parent; if it ended before this call, so does this process.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)


def is_stopped(pid: int) -> bool:
    """Whether the process was stopped by a signal (SIGSTOP)."""
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123 -- no Path in the hot loop
            text = file.read()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text[text.rindex(")") + 2] in "Tt"


class Child:
    """A process, held so that its number cannot come to mean another one.

    Attributes:
        pid: its number.
        pidfd: readable once it has ended.
    """

    def __init__(self, pid: int) -> None:
        """Raises ProcessLookupError: it has ended and was reaped already."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)

    def has_ended(self) -> bool:
        """Whether it runs no more."""
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def signal(self, number: int) -> None:
        """Sends a signal; nothing happens if it has ended."""
        if not self.has_ended():
            signal.pidfd_send_signal(self.pidfd, number)

    def kill_group(self) -> None:
        """Kills it and what it started, if it leads a group of its own."""
        if not self.has_ended():
            try:
                os.killpg(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                self.signal(signal.SIGKILL)  # It has not yet made its group.

    def wait(self, timeout_s: float) -> bool:
        """Waits for its end; whether it came."""
        deadline_s = time.monotonic() + timeout_s
        return bool(select.select([self.pidfd], [], [], max(0, deadline_s - time.monotonic()))[0])

    def close(self) -> None:
        """Lets go of it."""
        os.close(self.pidfd)
