"""Falcon (Almazrouei et al., "The Falcon Series of Open Language Models", 2023).

Attention and MLP run side by side on the same input. Falcon-7B has one KV head and one norm
before both; Falcon-40B and -180B have groups of heads, and a norm for each.

A layer's parameters, each with a leading axis of L layers::

    {"attention_norm": {"scale": [E], "bias": [E]},
     "mlp_norm"?: {"scale": [E], "bias": [E]},                # num_layer_norms = 2
     "attention": {"qkv_proj": {"kernel": [E, (H + 2K)*D], "bias"?: [(H + 2K)*D]},
                   "o_proj": {"kernel": [H*D, E], "bias"?: [E]}},
     "mlp": {"up_proj": {"kernel": [E, F], "bias"?: [F]},
             "down_proj": {"kernel": [F, E], "bias"?: [E]}}}
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import Attention, BranchOutput, Cache, LayerAttend, Mlp
from models.ops.norm import LayerNorm
from models.ops.rope import Rope


class FalconLayer(nnx.Module):
    """Attention and MLP in parallel."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.has_mlp_norm = config.num_layer_norms == 2
        self.attention_norm = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        if self.has_mlp_norm:
            self.mlp_norm = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(
            config, dtype=dtype, rngs=rngs, output_bias=config.attention_bias, fused=True
        )
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, rope: Rope, attend: LayerAttend[Cache], branch_output: BranchOutput
    ) -> tuple[jax.Array, Cache]:
        """See `models.decoder.Layer`."""
        normed = self.attention_norm(x)
        attended, cache = self.attention(normed, rope, attend)
        mlp_input = self.mlp_norm(x) if self.has_mlp_norm else normed
        x = x + branch_output(attended, "attention")
        return x + branch_output(self.mlp(mlp_input), "mlp"), cache


FALCON_DECODER = Decoder(layer=FalconLayer, norm=LayerNorm)
