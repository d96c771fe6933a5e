"""Which cores run the engine's steps, and which all the rest."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import jax


@dataclass(frozen=True, slots=True)
class Placement:
    """Numbers of cores; the same set twice if they are shared."""

    engine_cores: frozenset[int]
    other_cores: frozenset[int]

    @property
    def all_cores(self) -> frozenset[int]:
        return self.engine_cores | self.other_cores

    @contextmanager
    def on_engine_cores(self) -> Iterator[None]:
        """For the calling thread, and for the threads and processes that it starts inside."""
        os.sched_setaffinity(0, self.engine_cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, self.other_cores)


def place_engine(num_engine_cores: int | None, *, on_first: bool = False) -> Placement:
    """Gives the device's threads the last cores and everything else the others.

    Must be called before anything has asked JAX for its devices: that starts the threads that
    run steps, as many as the calling thread may use cores, and they stay where they began.

    Args:
        num_engine_cores: None leaves all cores to all.
        on_first: takes the first cores instead. What a virtual machine's cores share with
            others differs: one may keep its speed when another does not.

    Raises:
        ValueError: no core would be left for the rest.
    """
    cores = sorted(os.sched_getaffinity(0))
    if num_engine_cores is None:
        return Placement(frozenset(cores), frozenset(cores))
    if not 1 <= num_engine_cores < len(cores):
        raise ValueError(
            f"--engine-cores {num_engine_cores} does not suit {len(cores)} cores: at least one "
            "must run steps, and at least one the rest"
        )
    engine_cores = cores[:num_engine_cores] if on_first else cores[-num_engine_cores:]
    placement = Placement(frozenset(engine_cores), frozenset(cores).difference(engine_cores))
    with placement.on_engine_cores():
        jax.devices()
    return placement
