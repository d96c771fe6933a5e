"""The way out of a process whose device hangs."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def leave_hung_device() -> NoReturn:
    """Ends the process at once with exit code 1, once `Engine.stop` gave False.

    A thread inside the device's runtime cannot be ended, and a process that
    ends in the usual way waits for it or crashes under it.
    """
    sys.stdout.flush()
    sys.stderr.write("error: the device does not answer; the process ends without it\n")
    sys.stderr.flush()
    os._exit(1)
