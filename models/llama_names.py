"""Name tables of the Llama family: Hugging Face folders and GGUF files."""

from __future__ import annotations

from dataclasses import replace

from checkpoint.name_table import NameTable, unpermute_rope
from models.config import ModelConfig
from models.llama import LLAMA_DECODER
from models.name_rules import FileNames, make_name_table

HF = FileNames(
    embed="model.embed_tokens.weight",
    other_names={"final_norm": "model.norm"},
    lm_head="lm_head.weight",
    layer_prefix="model.layers.{layer}.",
    layer_names={
        "attention_norm": "input_layernorm",
        "attention.q_proj": "self_attn.q_proj",
        "attention.k_proj": "self_attn.k_proj",
        "attention.v_proj": "self_attn.v_proj",
        "attention.o_proj": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate_proj": "mlp.gate_proj",
        "mlp.up_proj": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
    },
    ignored=(r".*\.rotary_emb\.inv_freq",),
)

GGUF = FileNames(
    embed="token_embd.weight",
    other_names={"final_norm": "output_norm"},
    lm_head="output.weight",
    layer_prefix="blk.{layer}.",
    layer_names={
        "attention_norm": "attn_norm",
        "attention.q_proj": "attn_q",
        "attention.k_proj": "attn_k",
        "attention.v_proj": "attn_v",
        "attention.o_proj": "attn_output",
        "mlp_norm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
    # rope_freqs.weight is part of the config: it scales the rotary embedding.
    ignored=(r"blk\.\d+\.attn_rot_embd\.weight", r"rope_freqs\.weight"),
)


def permuted(names: FileNames, config: ModelConfig) -> FileNames:
    """`names` for GGUF's architecture `llama`, which rotates neighbouring pairs: its q and k
    rows are re-ordered."""
    return replace(
        names,
        orders={
            "attention.q_proj": unpermute_rope(config.num_heads),
            "attention.k_proj": unpermute_rope(config.num_kv_heads),
        },
    )


def hf_name_table(config: ModelConfig) -> NameTable:
    """Names and orientations of a Hugging Face `LlamaForCausalLM` or `MistralForCausalLM`."""
    return make_name_table(LLAMA_DECODER, config, HF)


def gguf_name_table(config: ModelConfig) -> NameTable:
    """Names and orientations of a GGUF file of architecture `llama`."""
    return make_name_table(LLAMA_DECODER, config, permuted(GGUF, config))
