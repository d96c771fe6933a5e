"""A step without memory costs nobody a token; only if there is none again do requests end."""

from __future__ import annotations

import random
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jaxserve.engine.config import EngineConfig
from jaxserve.engine.executor import StepOutOfMemory
from jaxserve.engine.memory_recovery import MAX_RESTARTS, MemoryRecovery
from jaxserve.engine.offline import Completion, complete_in_order
from jaxserve.engine.request import FinishReason, GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.startup import RunningEngine, start_engine
from jaxserve.engine.step_device import StepDevice
from jaxserve.errors import OutOfMemory
from tests.engine.engine_rig import CollectingSink
from tests.engine.tiny_model import make_tiny_model

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "token_budget": 8,
    "buckets": "one",  # So that a request's bits don't depend on what runs beside it.
    "max_num_seqs": 6,
    "page_size": 4,
    "kv_cache_bytes": 40 * 1024,
}


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path
) -> Iterator[RunningEngine]:
    engine = start_engine(
        EngineConfig(
            model=str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")),
            **SETTINGS,
            compilation_cache_dir=compilation_cache,
        )
    )
    yield engine
    engine.close()


@contextmanager
def failing(running: RunningEngine, *calls: int) -> Iterator[None]:
    """The steps of these numbers, from 0 on, take what was donated to them and find no memory."""
    device = running.engine._loop._executor.device
    programs, counter = device.programs, iter(range(10**9))

    def wrapped(program: Any) -> Any:
        def step(params: Any, kv_pool: Any, slots: Any, inputs: Any) -> Any:
            if next(counter) in calls:
                for array in jax.tree.leaves((kv_pool, slots)):
                    array.delete()
                raise jax.errors.JaxRuntimeError(
                    "RESOURCE_EXHAUSTED: Out of memory allocating 7 bytes."
                )
            return program(params, kv_pool, slots, inputs)

        return step

    steps = {rows: wrapped(program) for rows, program in programs.steps.items()}
    device.programs = replace(programs, steps=steps)
    try:
        yield
    finally:
        device.programs = programs


def requests(count: int, prefix: str) -> list[GenerationRequest]:
    made = []
    for index in range(count):
        rng = random.Random(index)
        sampling = SamplingParams(
            temperature=rng.choice((0.0, 0.8)),
            seed=index,
            repetition_penalty=rng.choice((1.0, 1.2)),
            max_tokens=rng.randint(10, 30),
            logprobs=rng.choice((None, 2)),
            prompt_logprobs=rng.choice((None, 1)),
            ignore_eos=True,
        )
        prompt = tuple(rng.randrange(256) for _ in range(rng.choice((1, 5, 13, 30))))
        made.append(GenerationRequest(f"{prefix}{index}", prompt, sampling))
    return made


def run(running: RunningEngine, these: list[GenerationRequest]) -> list[Completion]:
    return list(complete_in_order(running.engine, these, max_ahead=len(these)))


def test_requests_are_computed_again_to_the_same_bits(running: RunningEngine) -> None:
    expected = run(running, requests(10, "undisturbed"))
    with failing(running, 0, 3, 8, 20, 21 + 30):
        made = run(running, requests(10, "disturbed"))
    for one, other in zip(expected, made, strict=True):
        assert (one.token_ids, one.text) == (other.token_ids, other.text)
        assert one.logprobs == other.logprobs
        assert one.prompt_logprobs == other.prompt_logprobs
    snapshot = running.engine.snapshot()
    assert snapshot.num_steps_out_of_memory >= 4
    assert not snapshot.is_recovering
    assert snapshot.compiles_after_ready == 0
    running.engine._scheduler.check_integrity()


def test_without_memory_again_and_again_the_younger_half_ends_each_time(
    running: RunningEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    these = [
        GenerationRequest(
            f"r{index}", (65 + index,), SamplingParams(temperature=0.0, max_tokens=40)
        )
        for index in range(6)
    ]
    expected = run(running, [replace(one, request_id=f"e{one.request_id}") for one in these])
    was_degraded = []
    recovery = running.engine._recovery
    assert recovery is not None
    monkeypatch.setattr(
        recovery, "_pause", lambda _: was_degraded.append(running.engine.snapshot().is_recovering)
    )
    sink = CollectingSink()
    # All six run before the first failure; the next two follow it at once.
    with failing(running, 12, 13, 14):
        for one in these:
            running.engine.add(one, sink)
        sink.wait_finished(*(one.request_id for one in these))
    ended = [one for one, (reason,) in sink.finals().items() if reason is FinishReason.ERROR]
    assert sorted(ended) == ["r1", "r2", "r3", "r4", "r5"]
    assert all(isinstance(sink.outputs(name)[-1].failure, OutOfMemory) for name in ended)
    assert sink.token_ids("r0") == expected[0].token_ids
    assert was_degraded == [True, True]
    running.engine._scheduler.check_integrity()


class _NoPool:
    def __init__(self, num_failures: int) -> None:
        self.num_failures = num_failures

    def restart(self) -> None:
        self.num_failures -= 1
        if self.num_failures >= 0:
            raise StepOutOfMemory


class _NoRequests:
    def lose_steps(self) -> list[Any]:
        return []


@pytest.mark.parametrize("num_failures", [0, 2, MAX_RESTARTS - 1, MAX_RESTARTS])
def test_the_pool_gets_some_seconds_of_patience(num_failures: int) -> None:
    pauses: list[float] = []
    recovery = MemoryRecovery(_NoRequests(), _NoPool(num_failures), pauses.append)
    if num_failures == MAX_RESTARTS:
        with pytest.raises(StepOutOfMemory):
            recovery.recover()
    else:
        assert recovery.recover() == []
    assert len(pauses) == min(num_failures, MAX_RESTARTS - 1)
    assert pauses == sorted(pauses)
    assert sum(pauses) < 10


LIMITED = """
import sys
from pathlib import Path
from dataclasses import replace
from tests.engine.test_out_of_memory import hungry_program, limited, requests, run
from tests.engine.test_out_of_memory import SETTINGS
from jaxserve.engine.startup import start_engine
from jaxserve.engine.config import EngineConfig

cache = Path(sys.argv[2])
running = start_engine(EngineConfig(model=sys.argv[1], compilation_cache_dir=cache, **SETTINGS))
expected = run(running, requests(4, "before"))
device = running.engine._loop._executor.device
programs = device.programs
hungry, num_bytes = hungry_program(device)
device.programs = replace(programs, steps={rows: hungry for rows in programs.steps})
with limited(num_bytes // 2):
    assert all(c.finish_reason == "error" for c in run(running, requests(4, "without memory")))
device.programs = programs
snapshot = running.engine.snapshot()
assert snapshot.num_steps_out_of_memory >= 3 and not snapshot.failed, snapshot
after = run(running, requests(4, "after"))
assert [c.token_ids for c in after] == [c.token_ids for c in expected]
running.engine._scheduler.check_integrity()
running.close()
print("steps without memory:", snapshot.num_steps_out_of_memory)
"""


def hungry_program(device: StepDevice) -> tuple[Any, int]:
    """A compiled step that needs far more than whatever else is allocated, and how much."""

    def step(params: Any, kv_pool: Any, slots: Any, inputs: jax.Array) -> Any:
        large = jnp.cumsum(jnp.outer(jnp.arange(8192.0), jnp.arange(8192.0) + inputs[0]), axis=0)
        (num_sample_rows,) = {layout.num_sample_rows for layout in layouts}
        outputs = jnp.zeros((num_sample_rows, 43), jnp.int32) + large.sum().astype(jnp.int32)
        return kv_pool, slots, outputs

    layouts = tuple(device.programs.layouts.values())
    inputs = jax.ShapeDtypeStruct((layouts[0].size,), jnp.int32)
    arrays = (device.params, device.kv_pool, device.slots, inputs)
    program = jax.jit(step, donate_argnums=(1, 2), keep_unused=True).lower(*arrays).compile()
    return program, program.memory_analysis().temp_size_in_bytes


@contextmanager
def limited(num_bytes: int) -> Iterator[None]:
    """This process gets this much more address space and no more."""
    status = Path("/proc/self/status").read_text()
    match = re.search(r"VmSize:\s+(\d+) kB", status)
    assert match is not None
    unlimited = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (1024 * int(match[1]) + num_bytes, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, unlimited)


@pytest.mark.long
def test_a_process_without_memory_serves_again_once_there_is_some(
    tmp_path: Path, compilation_cache: Path
) -> None:
    """The runtime's own error, of a real allocation that fails."""
    model = make_tiny_model(tmp_path / "tiny")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(model), str(compilation_cache)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "steps without memory" in done.stdout
