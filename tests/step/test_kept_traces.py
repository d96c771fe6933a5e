"""Traced steps in files between starts: the same bits, and never those of other code."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.layout import Layout, with_layout_constraint

from jaxserve.engine.compilation import ProgramBuild
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.kept_traces import TraceFolder, lower_step
from jaxserve.engine.startup import program_spec
from jaxserve.engine.step_arrays import allocate
from jaxserve.engine.step_device import StepDevice
from tests.step.harness import Driver, make_request
from tests.step.test_native import SAMPLED, executor_of, prompt_of, settings_of

BUCKETS = (24,)


@pytest.fixture
def folder(tmp_path: Path) -> TraceFolder:
    return TraceFolder.of(tmp_path)


def not_traced(*_: Any) -> Any:
    raise AssertionError("the step was traced again")


def lower(folder: TraceFolder, step: Any = not_traced, **changes: Any) -> jax.stages.Lowered:
    spec = replace(program_spec(settings_of(BUCKETS)), **changes)
    layout = spec.layouts[0]
    vector = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
    return lower_step(folder, spec, layout, step, vector)


def any_step(params: Any, kv_pool: Any, slots: Any, inputs: jax.Array) -> Any:
    """Of a step's shape, soon traced."""
    del params
    return kv_pool, slots, inputs + 1


def test_bits_are_those_of_a_step_that_was_not_kept(folder: TraceFolder) -> None:
    settings = settings_of(BUCKETS)
    params = executor_of(settings).device.params

    def streams(executor: JaxExecutor) -> list[Any]:
        driver = Driver(settings, executor=executor)
        for index in range(3):
            driver.add(make_request(f"r{index}", prompt_of(5 + 9 * index, seed=index), SAMPLED))
        return [stream.bits() for stream in driver.run().values()]

    for _ in range(2):  # Traced and written, then read.
        with ProgramBuild(program_spec(settings, folder)) as build:
            device = StepDevice(build.result(), params, allocate(settings))
        assert len(list(folder.path.iterdir())) == len(BUCKETS)
        assert streams(JaxExecutor(device)) == streams(executor_of(settings))


def test_what_is_kept_is_not_traced_again(folder: TraceFolder) -> None:
    first = lower(folder, any_step).as_text()
    assert lower(folder).as_text() == first


def test_a_step_that_holds_xla_to_a_layout_is_kept(folder: TraceFolder) -> None:
    """As the reference's KV write does, beside native products when keys are held in 8 bits."""

    def step(params: Any, kv_pool: Any, slots: Any, inputs: jax.Array) -> Any:
        held = with_layout_constraint(kv_pool, Layout(tuple(range(kv_pool.ndim))))
        return any_step(params, held, slots, inputs)

    first = lower(folder, step).as_text()
    assert "LayoutConstraint" in first
    assert lower(folder).as_text() == first


def test_other_programs_are_traced(folder: TraceFolder) -> None:
    lower(folder, any_step)
    with pytest.raises(AssertionError, match="traced again"):
        lower(replace(folder, code_digest="that of other code"))
    with pytest.raises(AssertionError, match="traced again"):
        lower(folder, max_model_len=48)
    with (
        jax.default_matmul_precision("highest"),
        pytest.raises(AssertionError, match="traced again"),
    ):
        lower(folder)


def test_a_damaged_trace_is_written_anew(
    folder: TraceFolder, caplog: pytest.LogCaptureFixture
) -> None:
    lower(folder, any_step)
    (path,) = folder.path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[:100] + bytes([whole[100] ^ 1]) + whole[101:])
    with caplog.at_level(logging.WARNING), pytest.raises(AssertionError, match="traced again"):
        lower(folder)
    assert "is damaged" in caplog.text
    lower(folder, any_step)
    lower(folder)
