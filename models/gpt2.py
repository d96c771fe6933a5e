"""GPT-2 (Radford et al., 2019): learned positions, LayerNorm, biases everywhere.

A layer's parameters, each with a leading axis of L layers::

    {"attention_norm", "mlp_norm": {"scale": [E], "bias": [E]},
     "attention": {"qkv_proj": {"kernel": [E, 3E], "bias": [3E]},
                   "o_proj": {"kernel": [E, E], "bias": [E]}},
     "mlp": {"up_proj": {"kernel": [E, F], "bias": [F]},
             "down_proj": {"kernel": [F, E], "bias": [E]}}}
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


class Gpt2Layer(nnx.Module):
    """Normalised attention, then a normalised MLP."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention_norm = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = Attention(
            config, dtype=dtype, rngs=rngs, output_bias=config.attention_bias, fused=True
        )
        self.mlp_norm = LayerNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = Mlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, rope: Rope, attend: LayerAttend[Cache], branch_output: BranchOutput
    ) -> tuple[jax.Array, Cache]:
        """See `models.decoder.Layer`."""
        attended, cache = self.attention(self.attention_norm(x), rope, attend)
        x = x + branch_output(attended, "attention")
        return x + branch_output(self.mlp(self.mlp_norm(x)), "mlp"), cache


GPT2_DECODER = Decoder(layer=Gpt2Layer, norm=LayerNorm, learns_positions=True)
