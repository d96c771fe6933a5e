"""What the process gives up, so that a way into it leads to less."""

from __future__ import annotations

import ctypes
import os
import resource
from dataclasses import dataclass

_PR_SET_DUMPABLE = 4
_PR_GET_DUMPABLE = 3
_PR_SET_NO_NEW_PRIVS = 38
_PR_GET_NO_NEW_PRIVS = 39


@dataclass(frozen=True, slots=True)
class Hardening:
    """What holds for this process."""

    no_new_privileges: bool
    """No program that it starts gains rights, by setuid or otherwise."""
    dumpable: bool
    """Its memory, which holds prompts, may be read by other processes of its user."""
    core_bytes: int
    """Most bytes of a core dump."""
    is_root: bool

    def problems(self) -> list[str]:
        """What is not as it should be, for a person to read."""
        found = []
        if not self.no_new_privileges:
            found.append("the kernel does not let it give up new privileges")
        if self.dumpable:
            found.append("other processes of its user can read its memory")
        if self.core_bytes:
            found.append("a crash may write its memory, with prompts, to a core dump")
        if self.is_root:
            found.append("it runs as root: start it as a user of its own")
        return found


def harden() -> Hardening:
    """Gives up new privileges, readable memory and core dumps, for this process and those it
    starts, and takes as many descriptors as it may have. Cannot be taken back."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    return hardening()


def hardening() -> Hardening:
    """As the kernel says it is."""
    libc = ctypes.CDLL(None, use_errno=True)
    return Hardening(
        no_new_privileges=libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1,
        dumpable=libc.prctl(_PR_GET_DUMPABLE, 0, 0, 0, 0) == 1,
        core_bytes=resource.getrlimit(resource.RLIMIT_CORE)[0],
        is_root=os.geteuid() == 0,
    )
