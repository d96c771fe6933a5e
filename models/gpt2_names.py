"""Name tables of GPT-2: Hugging Face folders and GGUF files."""

from __future__ import annotations

from dataclasses import replace

from checkpoint.name_table import IDENTITY, NameTable
from models.config import ModelConfig
from models.gpt2 import GPT2_DECODER
from models.name_rules import FileNames, make_name_table

HF = FileNames(
    embed="transformer.wte.weight",
    embeddings={"position_embed": "transformer.wpe.weight"},
    other_names={"final_norm": "transformer.ln_f"},
    lm_head="lm_head.weight",
    layer_prefix="transformer.h.{layer}.",
    layer_names={
        "attention_norm": "ln_1",
        "attention.qkv_proj": "attn.c_attn",
        "attention.o_proj": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up_proj": "mlp.c_fc",
        "mlp.down_proj": "mlp.c_proj",
    },
    # Matrices of its `Conv1D` are [in, out], as ours.
    kernels=IDENTITY,
    # Masks that older versions of transformers stored.
    ignored=(r"transformer\.h\.\d+\.attn\.(masked_)?bias",),
)
HF_BASE = replace(
    HF,
    embed="wte.weight",
    embeddings={"position_embed": "wpe.weight"},
    other_names={"final_norm": "ln_f"},
    layer_prefix="h.{layer}.",
    ignored=(r"h\.\d+\.attn\.(masked_)?bias",),
)
"""As the first published files are: a model without its head, and so without its prefix."""
GGUF = FileNames(
    embed="token_embd.weight",
    embeddings={"position_embed": "position_embd.weight"},
    other_names={"final_norm": "output_norm"},
    lm_head="output.weight",
    layer_prefix="blk.{layer}.",
    layer_names={
        "attention_norm": "attn_norm",
        "attention.qkv_proj": "attn_qkv",
        "attention.o_proj": "attn_output",
        "mlp_norm": "ffn_norm",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
)


def hf_name_table(config: ModelConfig) -> NameTable:
    """Names of a Hugging Face `GPT2LMHeadModel`."""
    return make_name_table(GPT2_DECODER, config, HF)


def hf_base_name_table(config: ModelConfig) -> NameTable:
    """Names of a Hugging Face `GPT2Model`."""
    return make_name_table(GPT2_DECODER, config, HF_BASE)


def gguf_name_table(config: ModelConfig) -> NameTable:
    """Names of a GGUF file of architecture `gpt2`."""
    return make_name_table(GPT2_DECODER, config, GGUF)
