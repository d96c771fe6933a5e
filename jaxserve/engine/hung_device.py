"""The way out of a process that has a thread which cannot be ended."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave_hung_device(
    why: str = "the device does not answer; the process ends without it",
) -> NoReturn:
    """Ends the process at once with exit code 1, once `Engine.stop` gave False.

    A thread inside the device's runtime cannot be ended, and a process that
    ends in the usual way waits for it or crashes under it.
    """
    sys.stderr.write(f"error: {why}\n")
    leave_at_once(1)


def leave_at_once(exit_code: int) -> NoReturn:
    """Ends the process without waiting for any of its threads, or for other processes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)
