"""Weights as they are served: in the settings' dtype, quantised or packed if they say so."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from checkpoint.param_loading import Place, flatten, unflatten
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.native_settings import FileKinds, NativeSettings
from jaxserve.engine.settings import EngineSettings
from jaxserve.engine.step import Params
from models.gguf_codes import kinds_in_file, load_codes
from models.gpu_layout import lay_out_for_gpu
from models.loading import ModelSource, keep_on_host
from models.native_layout import lay_out_natively
from models.ops.packed import Codes
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
    if settings.native is not None:
        return _load_natively(source, settings, settings.native, place or make_place(settings))
    params = _load(source, settings, place or make_place(settings))
    return lay_out_for_gpu(params) if settings.lays_out_for_gpu else params


def file_kinds(config: EngineConfig, source: ModelSource) -> FileKinds | None:
    """What `resolve_settings` must know of the file; None unless its codes are to be kept.

    Raises FormatError if it has none.
    """
    return kinds_in_file(source) if config.weights_format == "native" else None


def _load(source: ModelSource, settings: EngineSettings, place: Place) -> Params:
    if settings.quantization is None:
        return source.load_params(settings.dtype, place=place)
    on_host = source.load_params(settings.dtype, place=keep_on_host)
    sharding = settings.sharding
    if sharding is None:
        return quantize_params(on_host, settings.quantization, place)
    return quantize_params(on_host, settings.quantization, place, sharding.num_input_parts)


def _load_natively(
    source: ModelSource, settings: EngineSettings, native: NativeSettings, place: Place
) -> Params:
    """All weights are read to the host first, and packed there."""
    if native.file_kinds is not None:
        params, head = load_codes(source, settings.dtype)
    else:
        params = source.load_params(settings.dtype, place=keep_on_host)
        head = params["embed"].T if settings.model_config.tie_word_embeddings else params["lm_head"]
        head = head[None]
        if settings.quantization is not None:
            params = _as_codes(quantize_params(params, settings.quantization, keep_on_host))
    return place_natively(lay_out_natively(params, head, native.kind_of), place)


def place_natively(params: Params, place: Place) -> Params:
    """Host parameters that were laid out natively, on the device."""
    return jax.tree.map_with_path(
        lambda path, leaf: place(jax.tree_util.keystr(path), leaf), params
    )


def _as_codes(quantized: Params) -> Params:
    """int8 parameters of `quantize_params` on the host, with `Codes` for their kernels."""
    scales = flatten(quantized.pop("kernel_scales"))
    leaves = flatten(quantized)
    for name, scale in scales.items():
        path = f"layers.{name.removesuffix('.scale')}.kernel"
        # From signed to + 128.
        leaves[path] = Codes(leaves[path].view(np.uint8) ^ np.uint8(128), scale, None)
    return unflatten(leaves)


def make_place(settings: EngineSettings) -> Place:
    """Puts a leaf of the whole model where the steps look for it."""
    if settings.sharding is not None:
        return settings.sharding.place

    def place(path: str, host: npt.NDArray[Any]) -> jax.Array:
        del path
        placed: jax.Array = jax.device_put(host, settings.device)
        return placed

    return place
