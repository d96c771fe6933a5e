"""Steps run on their own cores, whatever thread asks for them."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tools.policy_evaluation.placement import place_engine

PROGRAM = """
import os, threading
from pathlib import Path
import jax, jax.numpy as jnp
from tools.policy_evaluation.placement import place_engine

def ticks():
    found = {}
    for task in Path("/proc/self/task").iterdir():
        try:
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            cores = frozenset(os.sched_getaffinity(int(task.name)))
        except (FileNotFoundError, ProcessLookupError):
            continue  # a thread that ended between the listing and the reading
        found[cores] = found.get(cores, 0) + int(fields[11]) + int(fields[12])
    return found

placement = place_engine(1, on_first=ON_FIRST)
assert placement.engine_cores == {sorted(placement.all_cores)[0 if ON_FIRST else -1]}
assert os.sched_getaffinity(0) == placement.other_cores
step = jax.jit(lambda x: jax.lax.fori_loop(0, 60, lambda _, y: y @ x / 700, x))
x = jnp.ones((700, 700))
step(x).block_until_ready()
before = ticks()
thread = threading.Thread(target=lambda: step(x).block_until_ready())
thread.start()
thread.join()
spent = {cores: now - before.get(cores, 0) for cores, now in ticks().items()}
engine = spent.pop(placement.engine_cores)
assert engine > 10 * (1 + sum(spent.values())), (engine, spent)
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs a core for each side")
@pytest.mark.parametrize("on_first", [False, True])
def test_steps_run_on_the_cores_that_they_were_given(*, on_first: bool) -> None:
    program = f"ON_FIRST = {on_first}\n{PROGRAM}"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_somebody_must_be_left_to_run_the_rest() -> None:
    cores = os.sched_getaffinity(0)
    with pytest.raises(ValueError, match="--engine-cores"):
        place_engine(len(cores))
    assert os.sched_getaffinity(0) == cores
