"""The parts that decoder layers are put together from: attention and MLPs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.ops.activation import ACTIVATIONS
from models.ops.linear import Linear
from models.ops.native_rows import NATIVE_GATES, native_gate
from models.ops.norm import RmsNorm, ZeroCentredRmsNorm
from models.ops.rope import Rope, apply_rope
from models.training_hooks import Branch

Cache = TypeVar("Cache")
LayerAttend: TypeAlias = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Cache]]
"""`attend(q[T, H, D], k[T, K, D], v[T, K, D]) -> (out[T, H, D], cache)` of one layer."""

BranchOutput: TypeAlias = Callable[[jax.Array, Branch], jax.Array]
"""`branch_output(out[T, E], branch) -> [T, E]`: what is added to the rows for a branch's output."""

INIT_STDDEV = 0.02

FUSED_PROJECTIONS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Projection -> those of the same rows that it holds side by side."""


def make_linear(
    in_features: int, out_features: int, *, use_bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
) -> Linear:
    """A `Linear` with the initial values that all families share."""
    return Linear(
        in_features, out_features, use_bias=use_bias, dtype=dtype, stddev=INIT_STDDEV, rngs=rngs
    )


def fuse_linears(module: nnx.Module, name: str) -> None:
    """Replace `module`'s projections by the one that holds them side by side, initialised anew."""
    parts: list[Linear] = [getattr(module, part) for part in FUSED_PROJECTIONS[name]]
    kernels = [part.kernel[...] for part in parts]
    for part in FUSED_PROJECTIONS[name]:
        delattr(module, part)
    fused = make_linear(
        kernels[0].shape[0],
        sum(kernel.shape[1] for kernel in kernels),
        use_bias=parts[0].use_bias,
        dtype=kernels[0].dtype,
        rngs=nnx.Rngs(0),
    )
    setattr(module, name, fused)


class Attention(nnx.Module):
    """The projections around attention; attention itself is given by the caller.

    Args:
        config: the model's config; `attention_bias` gives q, k and v a bias.
        dtype: of the parameters.
        rngs: source of the initial values.
        output_bias: whether the output projection has a bias.
        head_norm: normalises each head of q and k before rotation, if given.
        fused: one projection `qkv_proj` whose output is q, k and v side by side.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
        output_bias: bool,
        head_norm: type[RmsNorm] | type[ZeroCentredRmsNorm] | None = None,
        fused: bool = False,
    ) -> None:
        def linear(in_features: int, out_features: int, use_bias: bool) -> Linear:
            return make_linear(in_features, out_features, use_bias=use_bias, dtype=dtype, rngs=rngs)

        self.head_dim = config.head_dim
        self.num_heads, self.num_kv_heads = config.num_heads, config.num_kv_heads
        self.has_head_norm, self.is_fused = head_norm is not None, fused
        scalar = config.query_pre_attn_scalar
        # `attend` divides scores by the square root of D; this makes it another number.
        self.query_scale = 1.0 if scalar is None else math.sqrt(config.head_dim / scalar)
        width, has_bias = config.hidden_size, config.attention_bias
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        if fused:
            self.qkv_proj = linear(width, query_size + 2 * kv_size, has_bias)
        else:
            self.q_proj = linear(width, query_size, has_bias)
            self.k_proj = linear(width, kv_size, has_bias)
            self.v_proj = linear(width, kv_size, has_bias)
        self.o_proj = linear(query_size, width, output_bias)
        if head_norm is not None:
            self.q_norm = head_norm(config.head_dim, config.rms_norm_eps, dtype=dtype)
            self.k_norm = head_norm(config.head_dim, config.rms_norm_eps, dtype=dtype)

    def fuse_projections(self) -> None:
        """Take q, k and v as one projection, see `models.gpu_layout`."""
        if not self.is_fused:
            fuse_linears(self, "qkv_proj")
            self.is_fused = True

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`x[T, E]` to `q[T, H, D]`, `k[T, K, D]`, `v[T, K, D]`, not yet rotated."""
        if self.is_fused:
            heads = self.qkv_proj(x).reshape(x.shape[0], -1, self.head_dim)
            end = self.num_heads + self.num_kv_heads
            return heads[:, : self.num_heads], heads[:, self.num_heads : end], heads[:, end:]
        q, k, v = (
            projection(x).reshape(x.shape[0], -1, self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return q, k, v

    def __call__(
        self, x: jax.Array, rope: Rope, attend: LayerAttend[Cache]
    ) -> tuple[jax.Array, Cache]:
        """`x[T, E]`, normalised, to `([T, E], cache)`."""
        q, k, v = self.project(x)
        if self.has_head_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, *rope), apply_rope(k, *rope)
        if self.query_scale != 1.0:
            q = q * jnp.asarray(self.query_scale, q.dtype)
        attended, cache = attend(q, k, v)
        return self.o_proj(attended.astype(x.dtype).reshape(x.shape[0], -1)), cache


class GatedMlp(nnx.Module):
    """`down(act(gate(x)) * up(x))`; fused, gate and up are one projection side by side."""

    def __init__(
        self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs, fused: bool = False
    ) -> None:
        def linear(in_features: int, out_features: int) -> Linear:
            return make_linear(
                in_features, out_features, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs
            )

        self.activation, self.is_fused = config.hidden_act, fused
        if fused:
            self.gate_up_proj = linear(config.hidden_size, 2 * config.intermediate_size)
        else:
            self.gate_proj = linear(config.hidden_size, config.intermediate_size)
            self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def fuse_projections(self) -> None:
        """Take gate and up as one projection, see `models.gpu_layout`."""
        if not self.is_fused:
            fuse_linears(self, "gate_up_proj")
            self.is_fused = True

    def __call__(self, x: jax.Array) -> jax.Array:
        activation = ACTIVATIONS[self.activation]
        if self.is_fused:
            both, packed = self.gate_up_proj(x), self.gate_up_proj.packed
            if packed is not None and self.activation in NATIVE_GATES:
                return self.down_proj(native_gate(both, self.activation, packed.num_live))
            gate, up = jnp.split(both, 2, axis=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(activation(gate) * up)


class Mlp(nnx.Module):
    """`down(act(up(x)))`."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.activation = config.hidden_act
        sizes = (config.hidden_size, config.intermediate_size)
        self.up_proj = make_linear(*sizes, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.down_proj = make_linear(*sizes[::-1], use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(ACTIVATIONS[self.activation](self.up_proj(x)))
