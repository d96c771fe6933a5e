"""Parameters whose projections are kept in 8 or 4 bits, for serving.

A quantised model's parameters are those of `models.decoder`, but each projection's kernel under
`layers` holds codes, and `kernel_scales`, nested like `layers`, holds `{"scale": ...}` where the
projection is. Embeddings, head, norms and biases stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from checkpoint.errors import FormatError
from checkpoint.param_loading import Place, flatten, unflatten
from models.config import ModelConfig
from models.decoder import Params
from models.ops.quantized import INT4_GROUP, quantize

_KERNEL = ".kernel"


def check_quantizable(config: ModelConfig, abstract: Params, weight_format: str) -> None:
    """Raises FormatError naming the part of the model that the format does not fit."""
    if config.num_experts:
        raise FormatError(
            f"{weight_format} weights are not supported for {config.family}: experts' matrices "
            "stay as they are; serve it without --quantization"
        )
    for path, leaf in _kernels(abstract).items():
        if weight_format == "int4" and leaf.shape[-2] % INT4_GROUP:
            raise FormatError(
                f"int4 weights need inputs in groups of {INT4_GROUP}, but {path} has "
                f"{leaf.shape[-2]}: use int8"
            )


def quantized_shapes(abstract: Params, weight_format: str | None) -> Params:
    """The pytree of `quantize_params` as `jax.ShapeDtypeStruct`; None leaves it as it is."""
    if weight_format is None:
        return abstract
    leaves = flatten(abstract)
    for path, leaf in _kernels(abstract).items():
        *stacked, num_in, num_out = leaf.shape
        is_int8 = weight_format == "int8"
        num_code_rows = num_in if is_int8 else num_in // 2
        scale_shape = (num_out,) if is_int8 else (num_in // INT4_GROUP, num_out)
        code_dtype = jnp.int8 if is_int8 else jnp.uint8
        leaves[path] = jax.ShapeDtypeStruct((*stacked, num_code_rows, num_out), code_dtype)
        leaves[_scale_path(path)] = jax.ShapeDtypeStruct((*stacked, *scale_shape), jnp.float32)
    return unflatten(leaves)


def quantize_params(
    params: Params,
    weight_format: str,
    place: Place,
    num_input_parts: Callable[[str], int] = lambda _: 1,
) -> Params:
    """Parameters on the device, with their kernels in few bits.

    Args:
        params: of host arrays; they are dropped one by one, so that beside the quantised ones
            no more than these are held.
        weight_format: one of `models.ops.quantized.FORMATS`.
        place: puts a leaf on the device.
        num_input_parts: how many devices share the inputs of a kernel, by its path. Each part is
            quantised by itself, so that int4's bytes pair inputs of one part.
    """
    leaves = flatten(params)
    kernels = set(_kernels(params))
    params.clear()
    placed: dict[str, jax.Array] = {}
    for path in list(leaves):
        host = np.asarray(leaves.pop(path))
        if path in kernels:
            codes, scales = _quantize_parts(host, weight_format, num_input_parts(path))
            placed[path] = place(path, codes)
            placed[_scale_path(path)] = place(_scale_path(path), scales)
        else:
            placed[path] = place(path, host)
    return unflatten(placed)


def _quantize_parts(
    kernel: npt.NDArray[Any], weight_format: str, num_parts: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Codes and scales of `kernel [L, in, out]`, its inputs in `num_parts` parts."""
    if weight_format == "int8":  # A scale belongs to all inputs, and a code to one.
        return quantize(kernel, weight_format)
    num_layers, num_in, num_out = kernel.shape
    parts = kernel.reshape(num_layers, num_parts, num_in // num_parts, num_out)
    codes, scales = quantize(parts, weight_format)
    return codes.reshape(num_layers, -1, num_out), scales.reshape(num_layers, -1, num_out)


def _kernels(params: Params) -> dict[str, Any]:
    """Path of each projection's kernel, `[L, in, out]`, and the leaf."""
    return {
        path: leaf
        for path, leaf in flatten(params).items()
        if path.startswith("layers.") and path.endswith(_KERNEL)
    }


def _scale_path(path: str) -> str:
    return f"kernel_scales.{path.removeprefix('layers.').removesuffix(_KERNEL)}.scale"
