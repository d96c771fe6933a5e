"""Mixtures of experts: Mixtral (Jiang et al., 2024) and Qwen3-MoE.

Attention is Mistral's and Qwen3's. The MLP is a mixture: a router chooses
`num_experts_per_token` of X gated MLPs for each row, and their outputs are weighted sums.
Instead of Llama's `mlp` a layer has, with a leading axis of L layers::

    {"mlp": {"router": {"kernel": [E, X]},
             "gate_proj", "up_proj": {"kernel": [X, E, F]},
             "down_proj": {"kernel": [X, F, E]}}}
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import INIT_STDDEV, make_linear
from models.llama import LlamaLayer
from models.ops.activation import ACTIVATIONS
from models.ops.experts import expert_matmul, route
from models.ops.norm import RmsNorm
from models.ops.tensor_shard import TensorShard
from models.qwen import Qwen3Layer


class ExpertKernels(nnx.Module):
    """One matrix for each expert: `kernel [X, in, out]`."""

    def __init__(self, shape: tuple[int, int, int], *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        values = INIT_STDDEV * jax.random.normal(rngs.params(), shape, jnp.float32)
        self.kernel = nnx.Param(values.astype(dtype))

    def __call__(self, x: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return expert_matmul(x, self.kernel[...], group_sizes)


class MoeMlp(nnx.Module):
    """A gated MLP of each chosen expert, weighted."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def kernels(in_features: int, out_features: int) -> ExpertKernels:
            shape = (config.num_experts, in_features, out_features)
            return ExpertKernels(shape, dtype=dtype, rngs=rngs)

        self.activation = config.hidden_act
        self.num_chosen = config.num_experts_per_token
        self.shard: TensorShard | None = None
        self.normalizes = config.normalize_expert_weights
        self.router = make_linear(
            config.hidden_size, config.num_experts, use_bias=False, dtype=dtype, rngs=rngs
        )
        self.gate_proj = kernels(config.hidden_size, config.intermediate_size)
        self.up_proj = kernels(config.hidden_size, config.intermediate_size)
        self.down_proj = kernels(config.intermediate_size, config.hidden_size)

    def __call__(self, x: jax.Array) -> jax.Array:
        """`x [T, E]` to `[T, E]`. A row's experts do not depend on other rows.

        With `shard`, this device holds some of the experts and adds nothing for the others.
        """
        num_rows = x.shape[0]
        num_held = self.gate_proj.kernel[...].shape[0]
        expert_ids, weights = route(self.router(x), self.num_chosen, normalize=self.normalizes)
        if self.shard is not None:
            expert_ids = expert_ids - self.shard.index() * num_held
            # After all that are held, and so in no group.
            is_held = (expert_ids >= 0) & (expert_ids < num_held)
            expert_ids = jnp.where(is_held, expert_ids, num_held)
        order = jnp.argsort(expert_ids.ravel(), stable=True)
        group_sizes = jnp.bincount(expert_ids.ravel(), length=num_held + 1)[:num_held]
        rows = x[order // self.num_chosen]
        hidden = ACTIVATIONS[self.activation](self.gate_proj(rows, group_sizes))
        hidden = hidden * self.up_proj(rows, group_sizes)
        by_expert = self.down_proj(hidden, group_sizes)
        chosen = by_expert[jnp.argsort(order)].reshape(num_rows, self.num_chosen, -1)
        if self.shard is not None:
            # Rows in no group hold anything.
            chosen = jnp.where(is_held[..., None], chosen, jnp.zeros_like(chosen))
        weighted = chosen * weights[..., None].astype(chosen.dtype)
        out = weighted.sum(axis=1)
        return out if self.shard is None else self.shard.sum(out)


class MixtralLayer(LlamaLayer):
    """See the file's head."""

    def make_mlp(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The mixture."""
        return MoeMlp(config, dtype=dtype, rngs=rngs)


class Qwen3MoeLayer(Qwen3Layer):
    """See the file's head."""

    def make_mlp(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """The mixture."""
        return MoeMlp(config, dtype=dtype, rngs=rngs)


MIXTRAL_DECODER = Decoder(layer=MixtralLayer, norm=RmsNorm)
QWEN3_MOE_DECODER = Decoder(layer=Qwen3MoeLayer, norm=RmsNorm)
