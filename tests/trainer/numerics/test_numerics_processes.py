"""Three real processes of jax.distributed make the bits of one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numerics_rig import make_runner, run

HERE = Path(__file__).parent
NUM_PROCESSES = 3


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.long
def test_processes_make_the_bits_of_one(tmp_path: Path, compilation_cache: Path) -> None:
    out = tmp_path / "state"
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[2]), str(HERE)]),
    }
    arguments = [str(out), str(compilation_cache), str(free_port()), str(NUM_PROCESSES)]
    program = [sys.executable, str(HERE / "numerics_process.py"), *arguments]
    processes = [
        subprocess.Popen([*program, str(index)], env=environment) for index in range(NUM_PROCESSES)
    ]
    try:
        reference = run(make_runner(1), 3)
        assert [process.wait(timeout=500) for process in processes] == [0] * NUM_PROCESSES
    finally:
        for process in processes:
            process.kill()
            process.wait()
    merged = np.zeros_like(reference.buffer)
    covered = np.zeros(len(merged), np.int32)
    read: list[int] = []
    for index in range(NUM_PROCESSES):
        found = json.loads(Path(f"{out}.{index}.json").read_text())
        part = np.frombuffer(Path(f"{out}.{index}").read_bytes(), np.uint8)
        for offset, size in found["ranges"]:
            merged[offset : offset + size] = part[offset : offset + size]
            covered[offset : offset + size] += 1
        read += found["read"]
        assert found["losses"] == [bits[0] for bits in reference.bits]
    assert (covered == 1).all()
    assert read == list(range(8))
    # Alignment gaps between scalars are nobody's values.
    layout = make_runner(1).layout
    for name in layout.vectors:
        assert (
            layout.vector(merged, name).tobytes() == layout.vector(reference.buffer, name).tobytes()
        )
    for scalar in layout.scalars:
        np.testing.assert_array_equal(
            layout.scalar(merged, scalar.name), layout.scalar(reference.buffer, scalar.name)
        )
