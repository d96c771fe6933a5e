"""LiveWeights: the weights that an engine serves, and how others take their place."""

from __future__ import annotations

import threading
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from jaxserve.engine.engine import Engine
from jaxserve.engine.inbox import done_in_time
from jaxserve.engine.memory_plan import available_bytes, bytes_per_device
from jaxserve.engine.pages import PagePool
from jaxserve.engine.scheduler.replica_scheduler import ReplicaPages
from jaxserve.engine.served_params import load_served_params, make_place
from jaxserve.engine.settings import EngineSettings
from jaxserve.engine.step import Params
from jaxserve.engine.step_device import StepDevice
from jaxserve.engine.weight_swaps import WeightSwaps
from jaxserve.errors import JaxserveError
from jaxserve.trained_model import open_model
from models.config import ModelConfig
from models.loading import ModelSource


class WeightsRefused(JaxserveError):
    """Weights that cannot take the place of those being served. These go on being served."""


class LiveWeights:
    """Exchanges weights under a running engine, without a compilation.

    A request runs on one version from its first step to its last. When a new version is loaded,
    no further request begins; those that have begun finish on the old weights, then the new ones
    take their place between two steps, the prefix cache is emptied, and the requests that wait
    begin. Until then both versions are in memory.

    Args:
        engine: running.
        device, pages: of this engine; touched in the engine's thread alone.
        settings: of this engine.
        source: what its weights were read from.
    """

    def __init__(
        self,
        engine: Engine,
        device: StepDevice,
        pages: PagePool | ReplicaPages,
        settings: EngineSettings,
        source: ModelSource,
    ) -> None:
        self._engine = engine
        self._device = device
        self._pages = pages
        self._settings = settings
        self._swapping = threading.Lock()
        self._name, self._step = _described(source)
        self._swaps = WeightSwaps()

    @property
    def name(self) -> str:
        """The version that new requests get: the model's name, with `@STEP` for a checkpoint."""
        return self._name

    @property
    def step(self) -> int | None:
        """The checkpoint's number; None for a model that is not one of ours."""
        return self._step

    @property
    def swaps(self) -> WeightSwaps:
        """How often weights were exchanged, and how often that was refused."""
        return self._swaps

    def swap(self, path: Path, timeout_s: float | None = None) -> None:
        """Read the model at `path` and serve it. Returns when it is what new requests get.

        Tokenizer, chat template and name of the model stay as they are.

        Args:
            path: as for `jaxserve.trained_model.open_model`.
            timeout_s: how long to wait for the requests that have begun; None for ever.

        Raises:
            WeightsRefused: another model, damaged or not finite weights, too little memory, or
                the time is up. The old weights go on being served.
            NotAccepting: the engine stops.
        """
        with self._swapping:
            try:
                self._swap(path, timeout_s)
            except WeightsRefused:
                self._swaps = replace(self._swaps, num_refused=self._swaps.num_refused + 1)
                raise

    def _swap(self, path: Path, timeout_s: float | None) -> None:
        try:
            source = open_model(path)
            params = self._load(source)
        except (ValueError, OSError, JaxserveError) as error:  # FormatError, StoreError too.
            raise WeightsRefused(f"{path} is not served: {error}") from error
        described = _described(source)

        def exchange() -> None:
            self._pages.forget()
            self._device.params = params
            self._name, self._step = described
            self._swaps = replace(self._swaps, num_done=self._swaps.num_done + 1)

        done = self._engine.run_between_requests(exchange)
        if not done_in_time(done, timeout_s):
            raise WeightsRefused(
                f"{path} is not served: requests of the old version still ran after {timeout_s:g} s"
            )

    def _load(self, source: ModelSource) -> Params:
        _check_config(self._settings.model_config, source.config)
        settings = self._settings
        needed = bytes_per_device(self._device.params)
        free = available_bytes(settings.device, settings.mesh.num_devices)
        put = make_place(settings)
        if needed > free:
            raise FormatError(
                f"both versions must be in memory for a moment: {needed / 1e6:.0f} MB more are "
                f"needed, {free / 1e6:.0f} MB are free"
            )

        def place(path: str, host: npt.NDArray[Any]) -> jax.Array:
            if not np.isfinite(host).all():
                raise FormatError("its weights hold NaN or infinity")
            placed: jax.Array = put(path, host)
            return placed

        params = load_served_params(source, settings, place)
        jax.block_until_ready(params)
        return params


def _described(source: ModelSource) -> tuple[str, int | None]:
    name = source.name if source.step is None else f"{source.name}@{source.step}"
    return name, source.step


def _check_config(served: ModelConfig, other: ModelConfig) -> None:
    """Raises FormatError unless the compiled steps fit the other model, too."""
    names = [field.name for field in fields(served)]
    differing = [name for name in names if getattr(served, name) != getattr(other, name)]
    if differing:
        name = differing[0]
        raise FormatError(
            f"it is another model: {name} is {getattr(other, name)!r}, and "
            f"{getattr(served, name)!r} in the one being served; start a server for it"
        )
