"""How much of the processor others had while something was measured."""

from __future__ import annotations

import os
import time

import psutil

MAX_FOREIGN_SHARE = 0.15
"""Above it a measurement counts for nothing. The kernel's threads, which write the page cache to
the disk, are foreign, too."""


class ForeignLoad:
    """Counts from its making on."""

    def __init__(self) -> None:
        self._began_s = time.perf_counter()
        self._before_s = _foreign_s()

    def share(self) -> float:
        """CPU time of other programs and of the hypervisor, as a share of all cores' time."""
        seconds = time.perf_counter() - self._began_s
        return (_foreign_s() - self._before_s) / (seconds * len(psutil.cpu_times(percpu=True)))


def _foreign_s() -> float:
    """Of all cores, less this process's and that of its children that have ended."""
    all_s = psutil.cpu_times()
    own = os.times()
    own_s = own.user + own.system + own.children_user + own.children_system
    return float(all_s.user + all_s.nice + all_s.system + all_s.steal - own_s)
