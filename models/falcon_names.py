"""Name tables of Falcon: Hugging Face folders and GGUF files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from checkpoint.name_table import Array, NameTable, Transform
from models.config import ModelConfig
from models.falcon import FALCON_DECODER
from models.name_rules import FileNames, make_name_table

HF = FileNames(
    embed="transformer.word_embeddings.weight",
    other_names={"final_norm": "transformer.ln_f"},
    lm_head="lm_head.weight",
    layer_prefix="transformer.h.{layer}.",
    layer_names={
        "attention_norm": "input_layernorm",
        "attention.qkv_proj": "self_attention.query_key_value",
        "attention.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h",
        "mlp.down_proj": "mlp.dense_4h_to_h",
    },
)
HF_TWO_NORMS = {"attention_norm": "ln_attn", "mlp_norm": "ln_mlp"}
GGUF = FileNames(
    embed="token_embd.weight",
    other_names={"final_norm": "output_norm"},
    lm_head="output.weight",
    layer_prefix="blk.{layer}.",
    layer_names={
        "attention_norm": "attn_norm",
        "attention.qkv_proj": "attn_qkv",
        "attention.o_proj": "attn_output",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
)
GGUF_TWO_NORMS = {"attention_norm": "attn_norm_2", "mlp_norm": "attn_norm"}


def ungroup_qkv(num_heads: int, num_kv_heads: int) -> Transform:
    """Rows from one group after the other, each `q ..., k, v`, to all q, all k, all v.

    Works on `[(H + 2K) * D, in]` and on a bias `[(H + 2K) * D]`.
    """
    group = num_heads // num_kv_heads

    def to_leaf(array: Array) -> Array:
        rows = array.reshape(num_kv_heads, group + 2, -1, *array.shape[1:])
        parts = (rows[:, :group], rows[:, group : group + 1], rows[:, group + 1 :])
        return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])

    def to_file(array: Array) -> Array:
        heads = array.reshape(num_heads + 2 * num_kv_heads, -1, *array.shape[1:])
        q = heads[:num_heads].reshape(num_kv_heads, group, *heads.shape[1:])
        k = heads[num_heads : num_heads + num_kv_heads][:, None]
        v = heads[num_heads + num_kv_heads :][:, None]
        return np.concatenate((q, k, v), axis=1).reshape(array.shape)

    return Transform(
        f"ungroup_qkv({num_heads}, {num_kv_heads})",
        to_leaf,
        to_file,
        lambda shape: shape,
        # Rows move across the whole array, so it is one group, which cannot be cut.
        num_groups=1,
    )


def hf_name_table(config: ModelConfig) -> NameTable:
    """Names of a Hugging Face `FalconForCausalLM`."""
    order = ungroup_qkv(config.num_heads, config.num_kv_heads)
    names = replace(_with_norms(config, HF, HF_TWO_NORMS), orders={"attention.qkv_proj": order})
    return make_name_table(FALCON_DECODER, config, names)


def gguf_name_table(config: ModelConfig) -> NameTable:
    """Names of a GGUF file of architecture `falcon`, which is ungrouped already."""
    return make_name_table(FALCON_DECODER, config, _with_norms(config, GGUF, GGUF_TWO_NORMS))


def _with_norms(config: ModelConfig, names: FileNames, two_norms: dict[str, str]) -> FileNames:
    if config.num_layer_norms == 1:
        return names
    return replace(names, layer_names=dict(names.layer_names) | two_norms)
