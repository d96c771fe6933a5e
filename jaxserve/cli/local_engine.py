"""An engine in this process, for commands that need no server."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console

from jaxserve.cli.pull import pull_with_progress
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.hung_device import leave_hung_device
from jaxserve.model_catalog import CATALOG

if TYPE_CHECKING:
    from jaxserve.engine.encoder.startup import RunningEncoder
    from jaxserve.engine.phases import OnPhase
    from jaxserve.engine.startup import RunningEngine

    _R = TypeVar("_R", RunningEngine, RunningEncoder)


@contextmanager
def local_engine(config: EngineConfig) -> Iterator[RunningEngine]:
    """Starts an engine, with signs of life on a terminal's standard error, and
    stops it in the end. Raises what `start_engine` does."""

    def start(on_phase: OnPhase) -> RunningEngine:
        # Imports jax, which takes a second: not before it is needed.
        from jaxserve.engine.startup import start_engine

        return start_engine(config, on_phase)

    with _running(config, start) as running:
        yield running


@contextmanager
def local_encoder(config: EngineConfig) -> Iterator[RunningEncoder]:
    """Like `local_engine`, for a model that makes embeddings."""

    def start(on_phase: OnPhase) -> RunningEncoder:
        from jaxserve.engine.encoder.startup import start_encoder

        return start_encoder(config, on_phase)

    with _running(config, start) as running:
        yield running


@contextmanager
def _running(config: EngineConfig, start: Callable[[OnPhase], _R]) -> Iterator[_R]:
    if config.model.lower() in CATALOG:
        pull_with_progress(config.model)
    console = Console(stderr=True)
    with console.status("Loading") as status:
        running = start(lambda phase, seconds: status.update(f"Loading: {phase} {seconds:.1f} s"))
    try:
        yield running
    finally:
        if not running.engine.stop():
            leave_hung_device()
        running.close()
