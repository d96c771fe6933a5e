"""Name tables of Mixtral and Qwen3-MoE: Hugging Face folders and GGUF files.

Hugging Face folders have a tensor for each expert, GGUF files one for all of a layer.
"""

from __future__ import annotations

from dataclasses import replace

from checkpoint.name_table import TRANSPOSE_EACH, NameTable
from models import llama_names, qwen_names
from models.config import ModelConfig
from models.moe import MIXTRAL_DECODER, QWEN3_MOE_DECODER
from models.name_rules import FileNames, make_name_table

MIXTRAL_HF = {
    "mlp.router": "block_sparse_moe.gate",
    "mlp.gate_proj": "block_sparse_moe.experts.{expert}.w1",
    "mlp.up_proj": "block_sparse_moe.experts.{expert}.w3",
    "mlp.down_proj": "block_sparse_moe.experts.{expert}.w2",
}
QWEN3_MOE_HF = {
    "mlp.router": "mlp.gate",
    "mlp.gate_proj": "mlp.experts.{expert}.gate_proj",
    "mlp.up_proj": "mlp.experts.{expert}.up_proj",
    "mlp.down_proj": "mlp.experts.{expert}.down_proj",
}
GGUF_EXPERTS = {
    "mlp.router": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate_exps",
    "mlp.up_proj": "ffn_up_exps",
    "mlp.down_proj": "ffn_down_exps",
}
STACKED = dict.fromkeys(("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), TRANSPOSE_EACH)


def _with_experts(names: FileNames, experts: dict[str, str]) -> FileNames:
    return replace(names, layer_names=dict(names.layer_names) | experts)


def mixtral_hf_name_table(config: ModelConfig) -> NameTable:
    """Names of a Hugging Face `MixtralForCausalLM`."""
    return make_name_table(MIXTRAL_DECODER, config, _with_experts(llama_names.HF, MIXTRAL_HF))


def mixtral_gguf_name_table(config: ModelConfig) -> NameTable:
    """Names of a GGUF file of architecture `llama` with experts."""
    names = _with_experts(llama_names.permuted(llama_names.GGUF, config), GGUF_EXPERTS)
    return make_name_table(MIXTRAL_DECODER, config, replace(names, kernel_transforms=STACKED))


def qwen3_moe_hf_name_table(config: ModelConfig) -> NameTable:
    """Names of a Hugging Face `Qwen3MoeForCausalLM`."""
    names = _with_experts(qwen_names.QWEN3_HF, QWEN3_MOE_HF)
    return make_name_table(QWEN3_MOE_DECODER, config, names)


def qwen3_moe_gguf_name_table(config: ModelConfig) -> NameTable:
    """Names of a GGUF file of architecture `qwen3moe`."""
    names = replace(_with_experts(qwen_names.QWEN3_GGUF, GGUF_EXPERTS), kernel_transforms=STACKED)
    return make_name_table(QWEN3_MOE_DECODER, config, names)
