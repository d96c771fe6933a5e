"""Phi-3, Phi-3.5 and Phi-4: Llama's layer with fused projections.

A layer's parameters, each with a leading axis of L layers::

    {"attention_norm", "mlp_norm": {"scale": [E]},
     "attention": {"qkv_proj": {"kernel": [E, (H + 2K)*D]}, "o_proj": {"kernel": [H*D, E]}},
     "mlp": {"gate_up_proj": {"kernel": [E, 2F]}, "down_proj": {"kernel": [F, E]}}}
"""

from __future__ import annotations

from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import Attention, GatedMlp
from models.llama import LlamaLayer
from models.ops.norm import RmsNorm


class Phi3Layer(LlamaLayer):
    """See the file's head."""

    def make_attention(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Attention:
        """q, k and v in one projection."""
        return Attention(
            config, dtype=dtype, rngs=rngs, output_bias=config.attention_bias, fused=True
        )

    def make_mlp(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """Gate and up in one projection."""
        return GatedMlp(config, dtype=dtype, rngs=rngs, fused=True)


PHI3_DECODER = Decoder(layer=Phi3Layer, norm=RmsNorm)
