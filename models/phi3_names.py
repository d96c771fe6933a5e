"""Name tables of Phi-3 and Phi-4: Hugging Face folders and GGUF files."""

from __future__ import annotations

from dataclasses import replace

from checkpoint.name_table import NameTable
from models import llama_names
from models.config import ModelConfig
from models.name_rules import make_name_table
from models.phi3 import PHI3_DECODER

HF = replace(
    llama_names.HF,
    layer_names={
        "attention_norm": "input_layernorm",
        "attention.qkv_proj": "self_attn.qkv_proj",
        "attention.o_proj": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate_up_proj": "mlp.gate_up_proj",
        "mlp.down_proj": "mlp.down_proj",
    },
)
GGUF = replace(
    llama_names.GGUF,
    layer_names={
        "attention_norm": "attn_norm",
        "attention.qkv_proj": "attn_qkv",
        "attention.o_proj": "attn_output",
        "mlp_norm": "ffn_norm",
        "mlp.gate_up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    # They are part of the config: they scale the rotary embedding.
    ignored=(r"rope_factors_(long|short)\.weight",),
)


def hf_name_table(config: ModelConfig) -> NameTable:
    """Names of a Hugging Face `Phi3ForCausalLM`."""
    return make_name_table(PHI3_DECODER, config, HF)


def gguf_name_table(config: ModelConfig) -> NameTable:
    """Names of a GGUF file of architecture `phi3`."""
    return make_name_table(PHI3_DECODER, config, GGUF)
