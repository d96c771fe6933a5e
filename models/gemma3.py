"""Gemma 3, text only (Team Gemma, "Gemma 3 Technical Report", 2025, section 2).

Most layers see a sliding window and rotate with a base of their own; each sixth sees
everything. Embeddings are scaled by the square root of E, heads of q and k are normalised, and
attention and MLP each stand between two norms. All norms scale by `1 + scale`. There is no
soft-capping, which Gemma 2 had.

A layer's parameters, each with a leading axis of L layers::

    {"attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm": {"scale": [E]},
     "attention": {"q_proj": {"kernel": [E, H*D]}, "k_proj", "v_proj": {"kernel": [E, K*D]},
                   "o_proj": {"kernel": [H*D, E]}, "q_norm", "k_norm": {"scale": [D]}},
     "mlp": {"gate_proj", "up_proj": {"kernel": [E, F]}, "down_proj": {"kernel": [F, E]}}}
"""

from __future__ import annotations

import jax
from flax import nnx
from jax.typing import DTypeLike

from models.config import ModelConfig
from models.decoder import Decoder
from models.layers import Attention, BranchOutput, Cache, GatedMlp, LayerAttend
from models.ops.norm import ZeroCentredRmsNorm
from models.ops.rope import Rope


class Gemma3Layer(nnx.Module):
    """Attention between two norms, then a gated MLP between two norms."""

    def __init__(self, config: ModelConfig, *, dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        def norm() -> ZeroCentredRmsNorm:
            return ZeroCentredRmsNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype)

        self.attention_norm = norm()
        self.attention = Attention(
            config,
            dtype=dtype,
            rngs=rngs,
            output_bias=config.attention_bias,
            head_norm=ZeroCentredRmsNorm,
        )
        self.attention_out_norm = norm()
        self.mlp_norm = norm()
        self.mlp = GatedMlp(config, dtype=dtype, rngs=rngs)
        self.mlp_out_norm = norm()

    def __call__(
        self, x: jax.Array, rope: Rope, attend: LayerAttend[Cache], branch_output: BranchOutput
    ) -> tuple[jax.Array, Cache]:
        """See `models.decoder.Layer`."""
        attended, cache = self.attention(self.attention_norm(x), rope, attend)
        x = x + branch_output(self.attention_out_norm(attended), "attention")
        mlp = self.mlp_out_norm(self.mlp(self.mlp_norm(x)))
        return x + branch_output(mlp, "mlp"), cache


GEMMA3_DECODER = Decoder(layer=Gemma3Layer, norm=ZeroCentredRmsNorm, scales_embedding=True)
