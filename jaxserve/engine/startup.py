"""Start-up: from an EngineConfig to an engine that has run a real step.

The model's header is read first; then the weights load while XLA compiles
every program from abstract shapes. The engine is READY only after each
program has run once and a prompt has been through a real step.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

import jax
import numpy as np

from checkpoint.param_loading import flatten
from jaxserve.engine.adapter_loader import AdapterLoader
from jaxserve.engine.compilation import (
    CompileCounter,
    ProgramBuild,
    ProgramSpec,
    use_compilation_cache,
)
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.engine import Engine, make_grammar_compiler
from jaxserve.engine.group.leader import Leader
from jaxserve.engine.group.leader_device import LeaderDevice
from jaxserve.engine.group.shared_settings import fingerprint, shared_settings
from jaxserve.engine.jax_executor import JaxExecutor
from jaxserve.engine.kept_traces import TraceFolder
from jaxserve.engine.kept_weights import load_kept_params
from jaxserve.engine.launch import start_devices
from jaxserve.engine.live_weights import LiveWeights
from jaxserve.engine.memory_plan import MemoryPlan, available_bytes, bytes_per_device
from jaxserve.engine.memory_recovery import MemoryRecovery
from jaxserve.engine.phases import OnPhase, Phases
from jaxserve.engine.pipeline_executor import PipelineExecutor
from jaxserve.engine.plan import Chunk, Decodes, MaskLoad, SlotLoad, StepPlan
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.served_params import file_kinds, make_place
from jaxserve.engine.settings import EngineSettings, resolve_settings
from jaxserve.engine.sizing import make_scheduler
from jaxserve.engine.slots import num_mask_words
from jaxserve.engine.step import Params
from jaxserve.engine.step_arrays import abstract_arrays, allocate
from jaxserve.engine.step_device import StepDevice
from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.model_store import resolve
from jaxserve.trained_model import open_model
from models.adapter_pool import place_leaves
from models.encoder_loading import is_encoder
from models.loading import ModelSource

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer


AnyExecutor = JaxExecutor | PipelineExecutor


@dataclass(frozen=True, slots=True)
class StartupReport:
    """What the start-up table shows."""

    model_name: str
    device: str
    settings: EngineSettings
    memory: MemoryPlan
    phases: Mapping[str, float]
    """Name -> seconds. The compiler and the allocation of the pool run beside
    the loading; only the waits for them add to the total."""
    ready_s: float
    """From the call to READY."""
    num_compiles: int
    """Programs asked of XLA before READY (hits in the persistent cache too)."""


@dataclass(frozen=True, slots=True)
class RunningEngine:
    engine: Engine
    tokenizer: Tokenizer
    model_source: ModelSource
    report: StartupReport
    compiles: CompileCounter
    weights: LiveWeights
    adapters: AdapterLoader

    def close(self) -> None:
        """Stops the engine at once."""
        try:
            self.engine.stop()
        finally:
            self.compiles.close()


def start_engine(
    config: EngineConfig, on_phase: OnPhase | None = None, *, leader: Leader | None = None
) -> RunningEngine:
    """Starts an engine and returns it READY.

    Args:
        config: of this process, which decides for all.
        on_phase: is told of every phase.
        leader: of the processes that serve the model together; None if this is the only one.

    Raises ConfigError (or another JaxserveError, or the loaders' ValueError)
    whose message holds the fix.
    """
    start = perf_counter()
    phases = Phases(on_phase)
    with phases.time("find model"):
        source = open_generator(config.model)
    if leader is not None:
        with phases.time("wait for processes"):
            leader.gather(config)
    with phases.time("start device"):
        start_devices(config.virtual_devices if leader is None else None)
        device = jax.local_devices()[0]
    settings = resolve_settings(config, source.config, device, file_kinds(config, source))
    if leader is not None and settings.loras is not None:
        raise ConfigError("--lora and --max-loras do not work with several processes: leave out")
    if leader is not None:
        leader.configure(shared_settings(config, settings))
    use_compilation_cache(settings.cache_dir)
    free_bytes = available_bytes(device, jax.local_device_count())
    memory_plan(settings, free_bytes).check()
    with phases.time("load tokenizer"):
        tokenizer = source.load_tokenizer()
    with ExitStack() as on_failure:
        grammars = make_grammar_compiler(tokenizer, settings.model_config)
        on_failure.callback(grammars.close)
        grammars.prepare()  # While XLA compiles.
        counter = CompileCounter()
        on_failure.callback(counter.close)
        step_device = load_and_compile(source, settings, phases)
        memory = memory_plan(settings, free_bytes, temp_bytes=step_device.programs.temp_bytes)
        memory.check()
        if leader is not None:
            with phases.time("wait for followers"):
                leader.wait_until_ready(fingerprint(settings))
            step_device = LeaderDevice(leader, step_device)
        executor = make_executor(step_device)
        with phases.time("first steps"):
            _write_no_adapter(settings, step_device)
            _run_first_steps(settings, executor)
        with phases.time("measure steps"):
            settings, scheduler = make_scheduler(settings, executor)
        on_failure.pop_all()
    num_compiles = counter.count
    engine = Engine(
        scheduler,
        executor,
        tokenizer,
        settings.model_config,
        count_compiles=lambda: (
            counter.count - num_compiles + (0 if leader is None else leader.num_compiles)
        ),
        grammars=grammars,
        max_loras=0 if settings.loras is None else settings.loras.max_loras,
        recovery=MemoryRecovery(scheduler, executor),
    )
    engine.start()
    adapters = AdapterLoader(engine, executor.device, settings, source.name)
    try:
        with phases.time("load adapters"):
            _load_first(adapters, config)
    except BaseException:
        engine.stop()
        counter.close()
        raise
    report = StartupReport(
        model_name=source.name,
        device=f"{device.platform}: {device.device_kind}",
        settings=settings,
        memory=memory,
        phases=phases.seconds,
        ready_s=perf_counter() - start,
        num_compiles=num_compiles,
    )
    weights = LiveWeights(engine, executor.device, scheduler.pages, settings, source)
    return RunningEngine(engine, tokenizer, source, report, counter, weights, adapters)


def _load_first(adapters: AdapterLoader, config: EngineConfig) -> None:
    """Raises ConfigError."""
    for name, folder in config.lora:
        try:
            adapters.load(name, folder)
        except InvalidRequest as error:
            raise ConfigError(f"--lora {name}={folder}: {error}") from error


def open_generator(model: str) -> ModelSource:
    """Raises ConfigError for an encoder, and what `resolve` and `open_model` do."""
    path = resolve(model)
    if is_encoder(path):
        raise ConfigError(
            f"{model} is an encoder, which generates no text: make embeddings with `jaxserve "
            f"embed {model} TEXT` or `jaxserve serve --model {model}`, or give a --model that "
            "generates"
        )
    return open_model(path)


def load_and_compile(source: ModelSource, settings: EngineSettings, phases: Phases) -> StepDevice:
    """Weights, pool and programs, side by side."""
    # Native steps run on one CPU, and each program's calls of kernels are ours.
    traces = None if settings.native is None else TraceFolder.of(settings.cache_dir)
    with (
        ProgramBuild(program_spec(settings, traces)) as build,
        ThreadPoolExecutor(1, thread_name_prefix="allocate") as allocator,
    ):
        state = allocator.submit(allocate, settings)
        with phases.time("load weights"):
            params = load_kept_params(source, settings)
        with phases.time("wait for the pool"):
            arrays = state.result()
        with phases.time("wait for the compiler"):
            programs = build.result()
    for name, seconds in programs.seconds.items():
        phases.record(name, seconds)
    return StepDevice(programs, params, arrays)


def build_executor(settings: EngineSettings, params: Params, *, depth: int = 2) -> JaxExecutor:
    """Compiles every program and allocates the pool, without an engine and without stages."""
    with ProgramBuild(program_spec(settings)) as build:
        programs = build.result()
    return JaxExecutor(StepDevice(programs, params, allocate(settings)), depth=depth)


def make_executor(device: StepDevice) -> AnyExecutor:
    """The executor of a device with or without stages."""
    return PipelineExecutor(device) if device.programs.num_stages > 1 else JaxExecutor(device)


def program_spec(settings: EngineSettings, traces: TraceFolder | None = None) -> ProgramSpec:
    return ProgramSpec(
        config=settings.model_config,
        dtype=settings.dtype,
        layouts=settings.layouts(),
        attention=settings.attention,
        max_model_len=settings.scheduler.max_model_len,
        params=settings.abstract_params(),
        arrays=abstract_arrays(settings),
        device=settings.device,
        sharding=settings.sharding,
        compiler_options=settings.compiler_options,
        place=settings.abstract_adapters(1),
        traces=traces,
    )


def memory_plan(settings: EngineSettings, free_bytes: int, *, temp_bytes: int = 0) -> MemoryPlan:
    """What each device holds, against what it has."""
    arrays = abstract_arrays(settings)
    return MemoryPlan(
        weights_bytes=bytes_per_device(settings.abstract_params()),
        kv_pool_bytes=bytes_per_device(arrays.kv_pool),
        slots_bytes=bytes_per_device(arrays.slots),
        temp_bytes=temp_bytes,
        available_bytes=free_bytes,
        adapters_bytes=bytes_per_device((arrays.adapters, settings.abstract_adapters(1))),
        num_pages=settings.scheduler.num_pages,
    )


def _write_no_adapter(settings: EngineSettings, device: StepDevice) -> None:
    """Runs the program that writes an adapter, if there is one."""
    shapes = settings.adapter_on_host()
    if shapes is None:
        return
    zeros = {path: np.zeros(leaf.shape, leaf.dtype) for path, leaf in flatten(shapes).items()}
    device.write_adapter(1, place_leaves(zeros, make_place(settings)))


def _run_first_steps(settings: EngineSettings, executor: AnyExecutor) -> None:
    """A short prompt and a decode through every bucket, on page 0 of slot 0."""
    every_token = b"\xff" * (4 * num_mask_words(settings.model_config.vocab_size))
    for step_id, rows in enumerate(settings.scheduler.buckets):
        num_tokens = max(1, min(rows, settings.scheduler.page_size - 1))
        token_ids = (0,) * num_tokens
        load = SlotLoad(
            slot=0,
            request_id="first-step",
            sampling=SamplingParams(temperature=0.0),
            seed=0,
            prompt_token_ids=token_ids,
            output_token_ids=(),
            stop_token_ids=(),
        )
        chunk = Chunk("first-step", 0, 0, num_tokens, token_ids, True, new_pages=(0,))
        masks = (MaskLoad(0, every_token),)
        executor.submit(StepPlan(step_id, rows, Decodes(), (chunk,), (load,), mask_loads=masks))
        decode = Chunk("first-step", 0, num_tokens, 1, (), True, new_pages=())
        executor.submit(StepPlan(step_id, rows, Decodes.of((decode,)), ()))
        for _ in range(2):
            executor.next_completion()
