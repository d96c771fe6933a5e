"""How a trainer's C library hands out memory; without it much of a step on a CPU is page faults.

XLA takes the activations of a step from `malloc` and gives them back after it. For large arrays
that is by default a new mapping every time, whose pages the kernel clears again one by one. These
settings keep the memory in the process, and in huge pages. They say where arrays lie, not what is
computed.
"""

from __future__ import annotations

from collections.abc import Mapping

_LARGEST_BLOCK_BYTES = 2**40
"""Larger than anything: nothing is mapped by itself, and nothing is given back."""

_SETTINGS = {
    "glibc.malloc.hugetlb": 1,
    "glibc.malloc.mmap_threshold": _LARGEST_BLOCK_BYTES,
    "glibc.malloc.trim_threshold": _LARGEST_BLOCK_BYTES,
    # Other arenas are made of small pieces, which large blocks do not fit in.
    "glibc.malloc.arena_max": 1,
}

VARIABLE = "GLIBC_TUNABLES"


def allocator_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variable to start a trainer with; read by glibc (2.35 or newer) when a program starts.

    Args:
        environment: the starter's own; what it already sets is kept.
    """
    given = [part for part in environment.get(VARIABLE, "").split(":") if part]
    names = {part.partition("=")[0] for part in given}
    own = [f"{name}={value}" for name, value in _SETTINGS.items() if name not in names]
    return {VARIABLE: ":".join([*given, *own])}
