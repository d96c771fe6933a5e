"""Name tables of Qwen2 and Qwen3. Their GGUF files rotate halves, so nothing is re-ordered."""

from __future__ import annotations

from dataclasses import replace

from checkpoint.name_table import NameTable
from models import llama_names
from models.config import ModelConfig
from models.name_rules import make_name_table
from models.qwen import QWEN2_DECODER, QWEN3_DECODER

QWEN3_HF = replace(
    llama_names.HF,
    layer_names=dict(llama_names.HF.layer_names)
    | {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"},
)
QWEN3_GGUF = replace(
    llama_names.GGUF,
    layer_names=dict(llama_names.GGUF.layer_names)
    | {"attention.q_norm": "attn_q_norm", "attention.k_norm": "attn_k_norm"},
)


def qwen2_hf_name_table(config: ModelConfig) -> NameTable:
    """Names of a Hugging Face `Qwen2ForCausalLM`."""
    return make_name_table(QWEN2_DECODER, config, llama_names.HF)


def qwen2_gguf_name_table(config: ModelConfig) -> NameTable:
    """Names of a GGUF file of architecture `qwen2`."""
    return make_name_table(QWEN2_DECODER, config, llama_names.GGUF)


def qwen3_hf_name_table(config: ModelConfig) -> NameTable:
    """Names of a Hugging Face `Qwen3ForCausalLM`."""
    return make_name_table(QWEN3_DECODER, config, QWEN3_HF)


def qwen3_gguf_name_table(config: ModelConfig) -> NameTable:
    """Names of a GGUF file of architecture `qwen3`."""
    return make_name_table(QWEN3_DECODER, config, QWEN3_GGUF)
