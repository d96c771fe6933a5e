"""The layout of a decoder's weights for serving on a GPU.

A GPU reads one large matrix faster than three small ones, and starts fewer kernels. In a layer's
parameters `q_proj`, `k_proj` and `v_proj` become `qkv_proj`, and `gate_proj` and `up_proj` become
`gate_up_proj`, as Phi-3 has them; `Decoder.run_layers` takes either. Each output is the same sum
of products as before.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from models.layers import FUSED_PROJECTIONS

Params = dict[str, Any]
"""See `models.decoder.Params`."""

_STACKED = ("layers", "kernel_scales")


def lay_out_for_gpu(params: Params) -> Params:
    """Parameters with their layers' projections side by side; those of other kinds stay.

    Args:
        params: a decoder's, quantised or not; its groups of layers are emptied one by one, so
            that never more than one group is held twice.
    """
    laid_out = {name: part for name, part in params.items() if name not in _STACKED}
    for name in _STACKED:
        if name in params:
            modules = params.pop(name)
            laid_out[name] = {key: _fuse(modules.pop(key)) for key in list(modules)}
    return laid_out


def shapes_on_gpu(abstract: Params) -> Params:
    """The pytree of `lay_out_for_gpu` as `jax.ShapeDtypeStruct`."""
    # Its dicts are emptied; eval_shape makes ones of its own.
    shapes: Params = jax.eval_shape(lay_out_for_gpu, abstract)
    return shapes


def _fuse(module: dict[str, Any]) -> dict[str, Any]:
    """One module's parameters; a leaf's last axis is that of outputs."""
    parts = dict(module)
    module.clear()
    for name, sources in FUSED_PROJECTIONS.items():
        # Experts have a router beside matrices of other shapes, which stay as they are.
        if all(source in parts for source in sources) and "router" not in parts:
            columns = [parts.pop(source) for source in sources]
            parts[name] = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), *columns)
    return parts


def is_fused(params: Params) -> bool:
    """Whether projections are side by side, by `lay_out_for_gpu`, by `models.native_layout` or
    because the model has them so."""
    return any(
        name in part
        for group in ("layers", "packed_kernels")
        for part in params.get(group, {}).values()
        if isinstance(part, dict)
        for name in FUSED_PROJECTIONS
    )


def fuse_layer(layer: nnx.Module) -> None:
    """Give a layer's modules the structure of fused parameters."""
    for child in list(vars(layer).values()):
        if hasattr(child, "fuse_projections"):
            child.fuse_projections()
