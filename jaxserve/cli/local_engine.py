"""An engine in this process, for commands that need no server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console

from jaxserve.cli.pull import pull_with_progress
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.hung_device import leave_hung_device
from jaxserve.model_catalog import CATALOG

if TYPE_CHECKING:
    from jaxserve.engine.startup import RunningEngine


@contextmanager
def local_engine(config: EngineConfig) -> Iterator[RunningEngine]:
    """Starts an engine, with signs of life on a terminal's standard error, and
    stops it in the end. Raises what `start_engine` does."""
    if config.model.lower() in CATALOG:
        pull_with_progress(config.model)
    console = Console(stderr=True)
    with console.status("Loading") as status:
        # Imports jax, which takes a second: not before it is needed.
        from jaxserve.engine.startup import start_engine

        running = start_engine(
            config, lambda phase, seconds: status.update(f"Loading: {phase} {seconds:.1f} s")
        )
    try:
        yield running
    finally:
        if not running.engine.stop():
            leave_hung_device()
        running.close()
