"""Weights as they are served: in the settings' dtype, quantised if they say so."""

from __future__ import annotations

from typing import Any

import jax
import numpy.typing as npt

from checkpoint.param_loading import Place
from jaxserve.engine.settings import EngineSettings
from jaxserve.engine.step import Params
from models.gpu_layout import lay_out_for_gpu
from models.loading import ModelSource, keep_on_host
from models.quantization import quantize_params


def load_served_params(
    source: ModelSource, settings: EngineSettings, place: Place | None = None
) -> Params:
    """All weights of `source` on the device, or on each device of the mesh its part.

    Quantised ones are read in full to the host first. Raises what `ModelSource.load_params` does.

    Args:
        source: of the model in the settings.
        settings: dtype, format and mesh.
        place: puts a leaf there; by default `make_place(settings)`.
    """
    params = _load(source, settings, place or make_place(settings))
    return lay_out_for_gpu(params) if settings.lays_out_for_gpu else params


def _load(source: ModelSource, settings: EngineSettings, place: Place) -> Params:
    if settings.quantization is None:
        return source.load_params(settings.dtype, place=place)
    on_host = source.load_params(settings.dtype, place=keep_on_host)
    sharding = settings.sharding
    if sharding is None:
        return quantize_params(on_host, settings.quantization, place)
    return quantize_params(on_host, settings.quantization, place, sharding.num_input_parts)


def make_place(settings: EngineSettings) -> Place:
    """Puts a leaf of the whole model where the steps look for it."""
    if settings.sharding is not None:
        return settings.sharding.place

    def place(path: str, host: npt.NDArray[Any]) -> jax.Array:
        del path
        placed: jax.Array = jax.device_put(host, settings.device)
        return placed

    return place
