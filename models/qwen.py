"""Qwen2, Qwen2.5 and Qwen3: Llama's layer with another attention.

Qwen2 has a bias on q, k and v and none on the output. Qwen3 normalises each head of q and k,
and may have biases on all four. Beside Llama's parameters a Qwen3 layer has::

    {"attention": {"q_norm", "k_norm": {"scale": [D]}}}
"""

from __future__ import annotations

from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import Attention
from models.llama import LlamaLayer
from models.ops.norm import RmsNorm


class Qwen2Layer(LlamaLayer):
    """See the file's head."""

    def make_attention(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Attention:
        """A bias on q, k and v."""
        return Attention(config, dtype=dtype, rngs=rngs, output_bias=False)


class Qwen3Layer(LlamaLayer):
    """See the file's head."""

    def make_attention(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> Attention:
        """Heads of q and k normalised."""
        return Attention(
            config, dtype=dtype, rngs=rngs, output_bias=config.attention_bias, head_norm=RmsNorm
        )


QWEN2_DECODER = Decoder(layer=Qwen2Layer, norm=RmsNorm)
QWEN3_DECODER = Decoder(layer=Qwen3Layer, norm=RmsNorm)
