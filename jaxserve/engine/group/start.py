"""A follower's part of the model: its shards, the same programs, the same order."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxserve.engine.compilation import CompileCounter, use_compilation_cache
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.group.shared_settings import fingerprint, with_shared_settings
from jaxserve.engine.memory_plan import available_bytes
from jaxserve.engine.phases import Phases
from jaxserve.engine.settings import resolve_settings
from jaxserve.engine.startup import load_and_compile, memory_plan, open_generator
from jaxserve.engine.step_device import StepDevice


class FollowerStart:
    """Makes what a follower runs; see `follower.Start`.

    Args:
        config: the model and the cache are taken from it, all else from the leader.
        process_id: of this process, which keeps its programs in a folder of its own: JAX writes
            cache entries in place.
    """

    def __init__(self, config: EngineConfig, process_id: int) -> None:
        self._config = config
        self._process_id = process_id
        self._phases = Phases(None)

    def __call__(self, settings: Mapping[str, Any]) -> tuple[StepDevice, str, Callable[[], int]]:
        """Raises what `start_engine` does."""
        config = with_shared_settings(self._config, settings)
        phases = self._phases
        with phases.time("find model"):
            source = open_generator(config.model)
        device = jax.local_devices()[0]
        resolved = resolve_settings(config, source.config, device)
        use_compilation_cache(resolved.cache_dir)
        use_compilation_cache(self._programs(resolved.cache_dir))
        free_bytes = available_bytes(device, jax.local_device_count())
        memory_plan(resolved, free_bytes).check()
        counter = CompileCounter()
        step_device = load_and_compile(source, resolved, phases)
        temp_bytes = step_device.programs.temp_bytes
        memory_plan(resolved, free_bytes, temp_bytes=temp_bytes).check()
        num_compiles = counter.count
        return step_device, fingerprint(resolved), lambda: counter.count - num_compiles

    def _programs(self, cache: Path) -> Path:
        return cache / f"process-{self._process_id}"
