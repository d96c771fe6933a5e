"""Ahead-of-time compilation: every program the engine runs is built before
READY, and afterwards nothing may compile."""

from __future__ import annotations

import os
import stat
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from jaxserve.engine.kept_traces import TraceFolder, lower_step
from jaxserve.engine.mask_loads import MaskLoadLayout, load_masks
from jaxserve.engine.mesh_step import make_mesh_load_masks, make_mesh_load_slot, make_mesh_step
from jaxserve.engine.pipeline_step import make_tick
from jaxserve.engine.slots import SlotLoadLayout, load_slot
from jaxserve.engine.step import Params, make_step
from jaxserve.engine.step_arrays import StepArrays
from jaxserve.engine.step_inputs import StepLayout
from jaxserve.errors import ConfigError
from models.adapter_pool import AdapterPool, write_place
from models.config import ModelConfig
from models.mesh_shape import ONE_DEVICE, MeshShape
from models.ops.attention.registry import AttentionImplementation
from models.sharding import ModelSharding

_BACKEND_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class CompileCounter:
    """Counts XLA compilations of this process while it is open.

    A hit in the persistent cache counts too: it means that a program was
    asked for that had not been built.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._seconds = 0.0
        jax.monitoring.register_event_duration_secs_listener(self._on_event)

    @property
    def count(self) -> int:
        return self._count

    @property
    def seconds(self) -> float:
        return self._seconds

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._on_event)

    def _on_event(self, event: str, duration_secs: float, **_: str | int) -> None:
        if event == _BACKEND_COMPILE_EVENT:
            with self._lock:
                self._count += 1
                self._seconds += duration_secs


@dataclass(frozen=True, slots=True)
class Programs:
    """The compiled objects that the hot path calls. A call with another shape
    raises; it never compiles."""

    steps: Mapping[int, Callable[..., Any]]
    """Bucket (rows) -> compiled step."""
    layouts: Mapping[int, StepLayout]
    load_slot: Callable[..., Any]
    load_layout: SlotLoadLayout
    load_masks: Callable[..., Any]
    mask_layout: MaskLoadLayout
    inputs_sharding: Sharding
    """Of a step's inputs: of one device, or int32 `[D, P, layout.size]` of a mesh."""
    load_sharding: Sharding
    """Of a load of a slot or of masks: of one device, or int32 `[D, layout.size]` of a mesh."""
    write_adapter: Callable[..., Any] | None
    """Of `models.adapter_pool.write_place`; None without room for adapters."""
    place_sharding: Sharding
    """Of the index of a place in the pool of adapters."""
    num_replicas: int
    """D"""
    num_stages: int
    """P"""
    temp_bytes: int
    """Most temporary memory of any program, from XLA's memory analysis."""
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Trace, lower and compile time of each program."""


@dataclass(frozen=True, slots=True)
class ProgramSpec:
    """Everything that the programs' shapes follow from."""

    config: ModelConfig
    dtype: jnp.dtype
    layouts: Sequence[StepLayout]
    attention: AttentionImplementation
    max_model_len: int
    params: Params
    """The weights as `jax.ShapeDtypeStruct`."""
    arrays: StepArrays
    """What the steps update, as `jax.ShapeDtypeStruct`."""
    device: jax.Device
    sharding: ModelSharding | None = None
    """Instead of `device`: the mesh."""
    compiler_options: Sequence[tuple[str, bool]] = ()
    """Of XLA, for the steps."""
    traces: TraceFolder | None = None
    """Where the steps of one CPU are kept as they were traced; None: they are traced anew."""
    place: AdapterPool | None = None
    """One place of the pool of adapters, as `jax.ShapeDtypeStruct`; None without room for any."""

    @property
    def step_params(self) -> Params:
        """What a step takes as its weights: with the adapters, if there is room for some."""
        pool = self.arrays.adapters
        return self.params if pool is None else {**self.params, "adapters": pool}

    @property
    def mesh(self) -> MeshShape:
        return ONE_DEVICE if self.sharding is None else self.sharding.shape

    @property
    def num_slots(self) -> int:
        return self.layouts[0].num_slots


def use_compilation_cache(directory: Path) -> None:
    """Turns on JAX's persistent cache for every program, however quick.

    Its entries are native code, so the directory must be the user's own and
    closed to others. Raises ConfigError otherwise.
    """
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = directory.stat()
    except OSError as error:
        raise ConfigError(
            f"--compilation-cache-dir {directory} cannot be used ({error.strerror}); "
            "give a directory that you can write"
        ) from error
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ConfigError(f"--compilation-cache-dir {directory} must be a directory that you own")
    if stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigError(
            f"--compilation-cache-dir {directory} holds native code and is open to others; "
            f"run: chmod 700 {directory}"
        )
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class ProgramBuild:
    """A compilation that runs in threads while the weights load.

    A context manager: leaving it drops what has not been compiled yet.
    """

    def __init__(self, spec: ProgramSpec) -> None:
        self._spec = spec
        # XLA compiles outside the GIL; the largest bucket goes first.
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="compile")
        layouts = sorted(spec.layouts, key=lambda layout: -layout.num_rows)
        self._steps = {
            layout.num_rows: self._pool.submit(_timed, partial(_compile_step, spec, layout))
            for layout in layouts
        }
        self._load_layout = SlotLoadLayout(spec.config.vocab_size, spec.max_model_len)
        self._load_slot = self._pool.submit(_timed, self._compile_load_slot)
        self._mask_layout = MaskLoadLayout(spec.num_slots, spec.config.vocab_size)
        self._load_masks = self._pool.submit(_timed, self._compile_load_masks)
        self._write_adapter = self._pool.submit(_timed, self._compile_write_adapter)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # After a failure nobody waits for programs that have not been begun.
        self._pool.shutdown(wait=False, cancel_futures=True)

    def result(self) -> Programs:
        """Waits for all programs."""
        seconds = {f"compile step of {rows} rows": f.result()[1] for rows, f in self._steps.items()}
        seconds["compile slot load"] = self._load_slot.result()[1]
        seconds["compile mask load"] = self._load_masks.result()[1]
        loads = [self._load_slot, self._load_masks]
        if self._spec.place is not None:
            seconds["compile adapter load"] = self._write_adapter.result()[1]
            loads.append(self._write_adapter)
        futures: list[Future[tuple[Any, float]]] = [*self._steps.values(), *loads]
        return Programs(
            steps={rows: future.result()[0] for rows, future in self._steps.items()},
            layouts={layout.num_rows: layout for layout in self._spec.layouts},
            load_slot=self._load_slot.result()[0],
            load_layout=self._load_layout,
            load_masks=self._load_masks.result()[0],
            mask_layout=self._mask_layout,
            inputs_sharding=_inputs_sharding(self._spec),
            load_sharding=_load_sharding(self._spec),
            write_adapter=self._write_adapter.result()[0],
            place_sharding=_place_sharding(self._spec),
            num_replicas=self._spec.mesh.data,
            num_stages=self._spec.mesh.stage,
            temp_bytes=max(_temp_bytes(future.result()[0]) for future in futures),
            seconds=seconds,
        )

    def _compile_load_slot(self) -> Any:
        spec, layout = self._spec, self._load_layout
        load: Callable[..., Any] = partial(load_slot, layout=layout)
        if spec.sharding is not None:
            load = make_mesh_load_slot(spec.sharding, layout)
        return self._compile_load(load, spec.arrays.slots, layout.size)

    def _compile_load_masks(self) -> Any:
        spec, layout = self._spec, self._mask_layout
        load: Callable[..., Any] = partial(load_masks, layout=layout)
        if spec.sharding is not None:
            load = make_mesh_load_masks(spec.sharding, layout)
        return self._compile_load(load, spec.arrays.slots.allowed_mask, layout.size)

    def _compile_write_adapter(self) -> Any:
        spec = self._spec
        if spec.place is None:
            return None
        pool = spec.arrays.adapters
        index = jax.ShapeDtypeStruct((), jnp.int32, sharding=_place_sharding(spec))
        shardings = None
        if spec.sharding is not None:
            shardings = jax.tree.map(lambda leaf: leaf.sharding, pool)
        write = jax.jit(write_place, donate_argnums=0, out_shardings=shardings)
        return write.lower(pool, spec.place, index).compile()

    def _compile_load(self, load: Callable[..., Any], loaded: Any, size: int) -> Any:
        """Of `load(loaded, vector)`, whose first argument is donated."""
        spec = self._spec
        vector = jax.ShapeDtypeStruct((size,), jnp.int32)
        if spec.sharding is not None:
            vector = jax.ShapeDtypeStruct(
                (spec.sharding.shape.data, size), jnp.int32, sharding=_load_sharding(spec)
            )
        return jax.jit(load, donate_argnums=0).lower(loaded, vector).compile()


def _compile_step(spec: ProgramSpec, layout: StepLayout) -> Any:
    if spec.traces is not None:
        step = make_step(spec.config, layout, spec.attention)
        vector = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        lowered = lower_step(spec.traces, spec, layout, step, vector)
    else:
        lowered = trace_step(spec, layout).lower()
    return lowered.compile(compiler_options=dict(spec.compiler_options) or None)


def trace_step(spec: ProgramSpec, layout: StepLayout) -> jax.stages.Traced:
    """The step of one bucket, for any platform."""
    sharding, arrays = spec.sharding, spec.arrays
    if sharding is None:
        step = make_step(spec.config, layout, spec.attention)
        vector = jax.ShapeDtypeStruct((layout.size,), jnp.int32)
        program = jax.jit(step, donate_argnums=(1, 2))
        return program.trace(spec.step_params, arrays.kv_pool, arrays.slots, vector)
    vector = jax.ShapeDtypeStruct(
        (spec.mesh.data, spec.mesh.stage, layout.size), jnp.int32, sharding=_inputs_sharding(spec)
    )
    if arrays.between_stages is None:
        mesh_step = make_mesh_step(sharding, layout, spec.attention, spec.step_params)
        program = jax.jit(mesh_step, donate_argnums=(1, 2))
        return program.trace(spec.step_params, arrays.kv_pool, arrays.slots, vector)
    tick = make_tick(sharding, layout, spec.attention, spec.step_params)
    program = jax.jit(tick, donate_argnums=(1, 2, 3))
    return program.trace(
        spec.step_params, arrays.kv_pool, arrays.slots, arrays.between_stages, vector
    )


def _inputs_sharding(spec: ProgramSpec) -> Sharding:
    if spec.sharding is None:
        return SingleDeviceSharding(spec.device)
    return spec.sharding.named("replicas", "plans")


def _load_sharding(spec: ProgramSpec) -> Sharding:
    if spec.sharding is None:
        return SingleDeviceSharding(spec.device)
    return spec.sharding.named("replicas")


def _place_sharding(spec: ProgramSpec) -> Sharding:
    return SingleDeviceSharding(spec.device) if spec.sharding is None else spec.sharding.named()


def _timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = perf_counter()
    result = work()
    return result, perf_counter() - start


def _temp_bytes(program: Any) -> int:
    analysis = program.memory_analysis()
    return int(analysis.temp_size_in_bytes) if analysis is not None else 0
