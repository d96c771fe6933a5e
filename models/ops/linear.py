"""A dense projection with its kernel as `[in, out]`, and low-rank adapters beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.ops.packed import PackedKernel
from models.ops.precision import matmul_precision
from models.ops.quantized import quantized_matmul
from models.ops.row_adapters import RowAdapters
from models.ops.tensor_shard import TensorShard

SPLIT_BY_INPUT = ("o_proj", "down_proj")
"""Projections of which devices that share a layer hold some rows each, where the others are held
by columns: their products are partial sums."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """LoRA (Hu et al. 2021, section 4.1): `scale * x @ a @ b` is added to `x @ kernel`."""

    a: jax.Array
    """`[in, r]`"""
    b: jax.Array
    """`[r, out]`"""
    scale: float

    def __call__(self, x: jax.Array) -> jax.Array:
        precision = matmul_precision(self.a.dtype)
        low = jnp.matmul(x, self.a, precision=precision)
        return self.scale * jnp.matmul(low, self.b, precision=precision)


@dataclass(frozen=True, slots=True)
class KernelScale:
    """What a quantised kernel's codes stand for; see `models.ops.quantized`."""

    values: jax.Array


@dataclass(frozen=True, slots=True)
class LayerKernel:
    """One layer's kernel among the packed ones of all layers; see `models.ops.packed`."""

    kernels: PackedKernel
    layer: jax.Array
    num_live: jax.Array | None
    """Of the rows; see `PackedKernel.multiply`."""


class Linear(nnx.Module):
    """`x @ kernel (+ bias)` in the kernel's dtype; in that of `x` if the kernel is quantised or
    packed.

    Args:
        in_features: size of the last axis of the input.
        out_features: size of the last axis of the output.
        use_bias: whether a bias `[out_features]` is added.
        dtype: dtype of the parameters.
        stddev: standard deviation of the kernel's initial values.
        rngs: source of the initial values.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        use_bias: bool,
        dtype: DTypeLike,
        stddev: float,
        rngs: nnx.Rngs,
    ) -> None:
        shape = (in_features, out_features)
        self.kernel = nnx.Param(
            (stddev * jax.random.normal(rngs.params(), shape, jnp.float32)).astype(dtype)
        )
        # A missing bias is a missing attribute: the state then has no empty leaf.
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((out_features,), dtype))
        self.use_bias = use_bias
        self.adapter: Adapter | None = None
        self.row_adapters: RowAdapters | None = None
        self.scale: KernelScale | None = None
        self.shard: TensorShard | None = None
        self.packed: LayerKernel | None = None

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.packed is not None:
            out = self.packed.kernels.multiply(x, self.packed.layer, self.packed.num_live)
        elif self.scale is None:
            kernel = self.kernel[...]
            out = jnp.matmul(x, kernel, precision=matmul_precision(kernel.dtype))
        else:
            out = quantized_matmul(x, self.kernel[...], self.scale.values)
        if self.row_adapters is not None:
            # Before the sum: what a device adds is a partial sum, too.
            out = self.row_adapters.add_to(out, x)
        if self.shard is not None:
            out = self.shard.sum(out)
        if self.use_bias:
            out = out + self.bias[...]
        return out if self.adapter is None else out + self.adapter(x).astype(out.dtype)


def attach_adapters(module: nnx.Module, adapters: Mapping[str, Any], scale: float) -> None:
    """Give `module`'s projections their adapters.

    Args:
        module: a layer of its own, for example one that was merged inside a scan's body.
        adapters: nested like the module's parameters, with `{"a": [in, r], "b": [r, out]}`
            where they have a projection's kernel.
        scale: of every adapter.
    """
    for name, part in adapters.items():
        child = getattr(module, name)
        if isinstance(child, Linear):
            child.adapter = Adapter(part["a"], part["b"], scale)
        else:
            attach_adapters(child, part, scale)


def attach_scales(module: nnx.Module, scales: Mapping[str, Any]) -> None:
    """Tell `module`'s projections that their kernels are codes.

    Args:
        module: as for `attach_adapters`.
        scales: nested like the module's parameters, with `{"scale": ...}` where they have a
            projection's kernel.
    """
    for name, part in scales.items():
        child = getattr(module, name)
        if isinstance(child, Linear):
            child.scale = KernelScale(part["scale"])
        else:
            attach_scales(child, part)


def drop_kernels(module: nnx.Module) -> None:
    """Take the kernels from `module`'s projections, which `attach_packed` then gives theirs."""
    for child in list(vars(module).values()):
        if isinstance(child, Linear):
            del child.kernel
        elif isinstance(child, nnx.Module):
            drop_kernels(child)


def attach_packed(
    module: nnx.Module,
    packed: Mapping[str, Any],
    layer: jax.Array,
    num_live: jax.Array | None,
) -> None:
    """Give `module`'s projections their kernels among the packed ones.

    Args:
        module: as for `attach_adapters`, without kernels.
        packed: nested like the module's parameters, with a `PackedKernel` for each projection.
        layer: index of the module's layer in the packed kernels, int32.
        num_live: of the rows; None: all.
    """
    for name, part in packed.items():
        child = getattr(module, name)
        if isinstance(part, PackedKernel):
            child.packed = LayerKernel(part, layer, num_live)
        else:
            attach_packed(child, part, layer, num_live)


def attach_shard(module: nnx.Module, shard: TensorShard) -> None:
    """Tell `module`'s parts whose results are partial sums to add them up.

    Args:
        module: as for `attach_adapters`, with this device's part of the weights.
        shard: this device's place.
    """
    for name, child in vars(module).items():
        if isinstance(child, Linear):
            if name in SPLIT_BY_INPUT:
                child.shard = shard
        elif isinstance(child, nnx.Module):
            if hasattr(child, "shard"):
                child.shard = shard
            else:
                attach_shard(child, shard)
