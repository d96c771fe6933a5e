"""Start-up of an encoder: from an EngineConfig to an engine that has run every step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import jax
import numpy as np

from jaxserve.engine.compilation import CompileCounter, use_compilation_cache
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.encoder.engine import EncoderEngine
from jaxserve.engine.encoder.executor import EncoderBuild, EncoderExecutor
from jaxserve.engine.encoder.plan import EncodePlan, EncodeText
from jaxserve.engine.encoder.scheduler import EncoderScheduler
from jaxserve.engine.encoder.settings import EncoderSettings, resolve_encoder_settings
from jaxserve.engine.memory_plan import MemoryPlan, available_bytes, bytes_per_device
from jaxserve.engine.phases import OnPhase, Phases
from jaxserve.errors import ConfigError
from jaxserve.model_store import resolve
from jaxserve.xc.model_folder import is_xc_model
from jaxserve.xc.served import ServedClassifier, open_served
from models.encoder_loading import Encoder, is_encoder, open_encoder

if TYPE_CHECKING:
    from models.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class EncoderReport:
    """What the start-up table shows."""

    model_name: str
    device: str
    settings: EncoderSettings
    memory: MemoryPlan
    phases: Mapping[str, float]
    """Name -> seconds."""
    ready_s: float
    """From the call to READY."""
    num_compiles: int
    """Programs asked of XLA before READY (hits in the persistent cache too)."""


@dataclass(frozen=True, slots=True)
class RunningEncoder:
    engine: EncoderEngine
    tokenizer: Tokenizer
    report: EncoderReport
    compiles: CompileCounter
    label_texts: tuple[str, ...] = ()
    """Of a model that classifies: one a label."""

    def close(self) -> None:
        """Stops the engine at once."""
        try:
            self.engine.stop()
        finally:
            self.compiles.close()


def start_encoder(config: EngineConfig, on_phase: OnPhase | None = None) -> RunningEncoder:
    """Starts an encoder's engine and returns it READY.

    Raises ConfigError (or another JaxserveError, or the loaders' ValueError)
    whose message holds the fix.
    """
    start = perf_counter()
    phases = Phases(on_phase)
    with phases.time("find model"):
        encoder = _open(config.model)
    with phases.time("start device"):
        device = jax.devices()[0]
    settings = resolve_encoder_settings(config, encoder, device)
    use_compilation_cache(settings.cache_dir)
    free_bytes = available_bytes(device)
    _memory_plan(settings, free_bytes).check()
    with phases.time("load tokenizer"):
        tokenizer = encoder.load_tokenizer()
    with ExitStack() as on_failure:
        counter = CompileCounter()
        on_failure.callback(counter.close)
        executor = _load_and_compile(encoder, settings, phases)
        memory = _memory_plan(settings, free_bytes, temp_bytes=executor.programs.temp_bytes)
        memory.check()
        with phases.time("first steps"):
            _run_first_steps(settings, executor)
        on_failure.pop_all()
    num_compiles = counter.count
    engine = EncoderEngine(
        EncoderScheduler(settings.buckets, max_in_flight=settings.max_in_flight),
        executor,
        max_tokens=settings.max_tokens,
        vocab_size=settings.model.vocab_size,
        max_queued_requests=settings.max_queued_requests,
        max_queued_tokens=settings.max_queued_tokens,
        count_compiles=lambda: counter.count - num_compiles,
    )
    engine.start()
    report = EncoderReport(
        model_name=encoder.path.resolve().name,
        device=f"{device.platform}: {device.device_kind}",
        settings=settings,
        memory=memory,
        phases=phases.seconds,
        ready_s=perf_counter() - start,
        num_compiles=num_compiles,
    )
    labels = encoder.label_texts() if isinstance(encoder, ServedClassifier) else ()
    return RunningEncoder(engine, tokenizer, report, counter, labels)


def _open(model: str) -> Encoder | ServedClassifier:
    path = Path(resolve(model))
    if is_xc_model(path):
        return open_served(path)
    if not is_encoder(path):
        raise ConfigError(
            f"{model} generates text and makes no embeddings: give an encoder, such as "
            "all-minilm-l6-v2"
        )
    return open_encoder(path)


def _load_and_compile(
    encoder: Encoder | ServedClassifier, settings: EncoderSettings, phases: Phases
) -> EncoderExecutor:
    """Weights and programs, side by side."""
    with EncoderBuild(settings) as build:
        with phases.time("load weights"):
            params = encoder.load_params(settings.dtype)
        finish = None
        if isinstance(encoder, ServedClassifier) and encoder.model.has_index:
            with phases.time("load label index"):
                finish = encoder.load_ranking()
        with phases.time("wait for the compiler"):
            programs = build.result()
    for name, seconds in programs.seconds.items():
        phases.record(name, seconds)
    return EncoderExecutor(
        programs, params, settings.device, depth=settings.max_in_flight, finish=finish
    )


def _memory_plan(settings: EncoderSettings, free_bytes: int, *, temp_bytes: int = 0) -> MemoryPlan:
    params = settings.model.abstract_params(settings.dtype)
    return MemoryPlan(
        weights_bytes=bytes_per_device(params),
        kv_pool_bytes=0,
        slots_bytes=0,
        temp_bytes=temp_bytes * settings.max_in_flight,
        available_bytes=free_bytes,
        num_pages=0,
        advice="lower --token-budget or --max-model-len, or choose a smaller --dtype",
    )


def _run_first_steps(settings: EncoderSettings, executor: EncoderExecutor) -> None:
    """A text of one token through every step. Raises ConfigError if the weights make
    no finite numbers of it."""
    for step_id, bucket in enumerate(settings.buckets):
        executor.submit(EncodePlan(step_id, bucket, (EncodeText("first-step", (0,)),)))
        _, results = executor.next_completion()
        if not np.isfinite(results.vectors[:, : settings.model.embedding_size]).all():
            raise ConfigError(
                "the model's embedding of its token 0 is not finite: its weights are damaged, or "
                "need --dtype float32"
            )
