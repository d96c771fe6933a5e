"""The Llama family: Llama 2 and 3, Mistral, SmolLM2.

A layer's parameters, each with a leading axis of L layers::

    {"attention_norm": {"scale": [E]},
     "attention": {"q_proj": {"kernel": [E, H*D], "bias"?: [H*D]},
                   "k_proj", "v_proj": {"kernel": [E, K*D], "bias"?: [K*D]},
                   "o_proj": {"kernel": [H*D, E], "bias"?: [E]}},
     "mlp_norm": {"scale": [E]},
     "mlp": {"gate_proj", "up_proj": {"kernel": [E, F], "bias"?: [F]},
             "down_proj": {"kernel": [F, E], "bias"?: [E]}}}
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import Attention, BranchOutput, Cache, GatedMlp, LayerAttend
from models.ops.norm import RmsNorm
from models.ops.rope import Rope


class LlamaLayer(nnx.Module):
    """Normalised attention, then a normalised gated MLP."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.attention_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.attention = self.make_attention(config, dtype=dtype, rngs=rngs)
        self.mlp_norm = RmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)
        self.mlp = self.make_mlp(config, dtype=dtype, rngs=rngs)

    def make_attention(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Attention:
        """Families that differ in their attention alone override this."""
        return Attention(config, dtype=dtype, rngs=rngs, output_bias=config.attention_bias)

    def make_mlp(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
        """Families that differ in their MLP alone override this."""
        return GatedMlp(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: jax.Array, rope: Rope, attend: LayerAttend[Cache], branch_output: BranchOutput
    ) -> tuple[jax.Array, Cache]:
        """See `models.decoder.Layer`."""
        attended, cache = self.attention(self.attention_norm(x), rope, attend)
        x = x + branch_output(attended, "attention")
        mlp = self.mlp(self.mlp_norm(x))
        return x + branch_output(mlp, "mlp"), cache


LLAMA_DECODER = Decoder(layer=LlamaLayer, norm=RmsNorm)

init_params = LLAMA_DECODER.init_params
abstract_params = LLAMA_DECODER.abstract_params
embed = LLAMA_DECODER.embed
run_layers = LLAMA_DECODER.run_layers
logits = LLAMA_DECODER.logits
