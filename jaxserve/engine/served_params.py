"""Weights as they are served: in the settings' dtype, quantised if they say so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy.typing as npt

from jaxserve.engine.settings import EngineSettings
from jaxserve.engine.step import Params
from models.loading import ModelSource, keep_on_host
from models.quantization import quantize_params

Place = Callable[[npt.NDArray[Any]], jax.Array]


def load_served_params(
    source: ModelSource, settings: EngineSettings, place: Place = jax.device_put
) -> Params:
    """All weights of `source` on the device.

    Quantised ones are read in full to the host first. Raises what `ModelSource.load_params` does.
    """
    if settings.quantization is None:
        return source.load_params(settings.dtype, place=place)
    on_host = source.load_params(settings.dtype, place=keep_on_host)
    return quantize_params(on_host, settings.quantization, place)
