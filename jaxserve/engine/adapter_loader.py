"""AdapterLoader: takes adapters into a running engine's pool, and out of it."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from jaxserve.engine.adapter_names import AdapterNames, ServedAdapter
from jaxserve.engine.engine import Engine
from jaxserve.engine.inbox import done_in_time
from jaxserve.engine.lora_settings import ADAPTER_NAME
from jaxserve.engine.served_params import make_place
from jaxserve.engine.settings import EngineSettings
from jaxserve.engine.step_device import StepDevice
from jaxserve.errors import InvalidRequest, NotAccepting, NotSupported
from models.adapter_pool import one_place, place_leaves
from models.lora_peft import read_peft

WRITE_TIMEOUT_S = 60.0
"""An adapter is written between two steps; a device that takes longer than this hangs."""


class AdapterLoader:
    """Of one engine. Its methods may be called from any thread, and block it.

    An adapter is read and checked beside the steps, then written into a free place of the pool
    between two of them. Requests that run on an adapter keep its place to their end, whatever
    becomes of its name; nothing compiles.

    Args:
        engine: running.
        device: of this engine; touched in the engine's thread alone.
        settings: of this engine.
        model_name: which no adapter may have.
    """

    def __init__(
        self, engine: Engine, device: StepDevice, settings: EngineSettings, model_name: str
    ) -> None:
        self._engine = engine
        self._device = device
        self._settings = settings
        self._model_name = model_name
        self._loading = threading.Lock()

    @property
    def max_loras(self) -> int:
        """Adapters that there is room for; 0 if there is none."""
        return 0 if self._settings.loras is None else self._settings.loras.max_loras

    @property
    def max_rank(self) -> int:
        """Of an adapter."""
        return 0 if self._settings.loras is None else self._settings.loras.max_rank

    @property
    def names(self) -> AdapterNames:
        return self._engine.adapters

    def num_open(self) -> Counter[str]:
        """Requests that run or wait, by the name of their adapter."""
        return self._engine.num_open_of_adapters()

    def load(self, name: str, folder: Path, shown_path: str | None = None) -> ServedAdapter:
        """Serve the adapter in `folder` as `name`, also if another one has this name.

        Args:
            name: letters, digits, dots, hyphens and underscores.
            folder: with the files of `peft`.
            shown_path: what clients are told; the folder by default.

        Raises:
            InvalidRequest: for the name, or for files that cannot be served.
            NoRoomForAdapter: all places are taken.
            NotSupported: the engine was started without room for adapters.
            NotAccepting: the engine stops, or hangs.
        """
        if self._settings.loras is None:
            raise NotSupported(
                "this server has no room for adapters: start it with --max-loras or --lora"
            )
        if ADAPTER_NAME.fullmatch(name) is None or name == self._model_name:
            raise InvalidRequest(
                "name",
                "must have 1 to 128 letters, digits, dots, hyphens and underscores, begin with a "
                "letter or digit, and not be the model's own",
            )
        with self._loading:
            leaves, rank = self._read(folder)
            digest = _digest(leaves)
            known = self.names.find(name)
            if known is not None and known.digest == digest:
                return known
            index = self.names.reserve(self._engine.adapters_in_use)
            try:
                self._write(index, leaves)
            except BaseException:
                self.names.give_back(index)
                raise
            adapter = ServedAdapter(name, index, rank, digest, shown_path or str(folder))
            self.names.publish(adapter)
            return adapter

    def unload(self, name: str) -> ServedAdapter:
        """No new request gets it; its place is free when the last one that runs on it has ended.

        Raises AdapterNotFound.
        """
        return self.names.remove(name)

    def _read(self, folder: Path) -> tuple[dict[str, npt.NDArray[Any]], int]:
        """The adapter as it is written, and its rank."""
        shapes = self._settings.adapter_on_host()
        assert shapes is not None
        try:
            adapter = read_peft(folder, self._settings.model_config)
            return one_place(adapter, shapes), adapter.rank
        except (FormatError, OSError) as error:
            raise InvalidRequest("path", f"the adapter is not served: {error}") from error

    def _write(self, index: int, leaves: Mapping[str, npt.NDArray[Any]]) -> None:
        placed = place_leaves(leaves, make_place(self._settings))
        jax.block_until_ready(placed)
        done = self._engine.run_between_steps(lambda: self._device.write_adapter(index, placed))
        if not done_in_time(done, WRITE_TIMEOUT_S):
            raise NotAccepting(
                f"no step has come to its end for {WRITE_TIMEOUT_S:g} s, so that the adapter could "
                "not be written: the device may hang"
            )


def _digest(leaves: Mapping[str, npt.NDArray[Any]]) -> str:
    """Of the numbers that are served, not of the files: nobody can change them in between."""
    digest = hashlib.sha256()
    for path, leaf in sorted(leaves.items()):
        digest.update(f"{path} {leaf.dtype.name} {leaf.shape}\0".encode())
        digest.update(np.ascontiguousarray(leaf).view(np.uint8).data)
    return digest.hexdigest()
