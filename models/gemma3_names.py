"""Name tables of Gemma 3: Hugging Face folders and GGUF files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from checkpoint.name_table import NameTable, Transform
from models import qwen_names
from models.config import ModelConfig
from models.gemma3 import GEMMA3_DECODER
from models.name_rules import make_name_table

ONE_ADDED = Transform(
    "one_added",
    lambda a: np.asarray(a, np.float32) - np.float32(1),
    lambda a: np.asarray(a, np.float32) + np.float32(1),
    lambda shape: shape,
)
"""GGUF files hold `1 + scale`. In float32 both ways, so that scales of bfloat16 models come back
bit for bit (down to 2 ** -16; what is smaller is lost against the one)."""

HF = replace(
    qwen_names.QWEN3_HF,
    layer_names=dict(qwen_names.QWEN3_HF.layer_names)
    | {
        "attention_out_norm": "post_attention_layernorm",
        "mlp_norm": "pre_feedforward_layernorm",
        "mlp_out_norm": "post_feedforward_layernorm",
    },
)
GGUF = replace(
    qwen_names.QWEN3_GGUF,
    layer_names=dict(qwen_names.QWEN3_GGUF.layer_names)
    | {"attention_out_norm": "post_attention_norm", "mlp_out_norm": "post_ffw_norm"},
    scales=ONE_ADDED,
)


def hf_name_table(config: ModelConfig) -> NameTable:
    """Names of a Hugging Face `Gemma3ForCausalLM`."""
    return make_name_table(GEMMA3_DECODER, config, HF)


def gguf_name_table(config: ModelConfig) -> NameTable:
    """Names of a GGUF file of architecture `gemma3`."""
    return make_name_table(GEMMA3_DECODER, config, GGUF)
