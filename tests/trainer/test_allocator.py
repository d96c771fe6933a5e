"""The allocator's settings, in real processes."""

from __future__ import annotations

import os
import subprocess
import sys

from jaxserve.trainer.allocator import VARIABLE, allocator_environment

ALLOCATE_AND_FREE = """
import resource
import numpy as np

np.ones(2**24, np.float32)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    np.ones(2**24, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(environment: dict[str, str]) -> int:
    """Of ten arrays of 64 MiB, made and freed one after the other."""
    environment = {**{k: v for k, v in os.environ.items() if k != VARIABLE}, **environment}
    command = [sys.executable, "-c", ALLOCATE_AND_FREE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return int(run.stdout)


def test_freed_arrays_are_used_again_instead_of_mapped_anew() -> None:
    assert page_faults({}) > 100, "this C library keeps the memory anyway: nothing is shown"
    assert page_faults(allocator_environment({})) < 10


def test_what_is_set_already_is_kept() -> None:
    given = {VARIABLE: "glibc.malloc.arena_max=2:glibc.malloc.perturb=7"}
    settings = allocator_environment(given)[VARIABLE].split(":")
    assert "glibc.malloc.arena_max=2" in settings
    assert "glibc.malloc.perturb=7" in settings
    assert "glibc.malloc.arena_max=1" not in settings
    assert "glibc.malloc.hugetlb=1" in settings
