"""Name tables of the Llama family: Hugging Face folders and GGUF files."""

from __future__ import annotations

from collections.abc import Iterator

from checkpoint.name_table import (
    IDENTITY,
    TRANSPOSE,
    NameTable,
    TensorRule,
    Transform,
    chain,
    unpermute_rope,
)
from models.config import ModelConfig

HF_PREFIX = "model.layers.{layer}."
HF_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.q_proj": "self_attn.q_proj",
    "attention.k_proj": "self_attn.k_proj",
    "attention.v_proj": "self_attn.v_proj",
    "attention.o_proj": "self_attn.o_proj",
    "mlp_norm": "post_attention_layernorm",
    "mlp.gate_proj": "mlp.gate_proj",
    "mlp.up_proj": "mlp.up_proj",
    "mlp.down_proj": "mlp.down_proj",
}

GGUF_PREFIX = "blk.{layer}."
GGUF_NAMES = {
    "attention_norm": "attn_norm",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def hf_name_table(config: ModelConfig) -> NameTable:
    """Names and orientations of a Hugging Face `LlamaForCausalLM` or `MistralForCausalLM`."""
    return NameTable(
        rules=(
            TensorRule("model.embed_tokens.weight", "embed"),
            *_layer_rules(config, HF_PREFIX, HF_NAMES, {}),
            TensorRule("model.norm.weight", "final_norm"),
            *_head_rules(config, "lm_head.weight"),
        ),
        ignored=(r".*\.rotary_emb\.inv_freq",),
        copies=_head_copies(config, "lm_head.weight", "model.embed_tokens.weight"),
    )


def gguf_name_table(config: ModelConfig) -> NameTable:
    """Names and orientations of a GGUF file of architecture `llama`.

    That architecture rotates neighbouring pairs, so its q and k rows are re-ordered.
    """
    permuted = {
        "attention.q_proj": unpermute_rope(config.num_heads),
        "attention.k_proj": unpermute_rope(config.num_kv_heads),
    }
    return NameTable(
        rules=(
            TensorRule("token_embd.weight", "embed"),
            *_layer_rules(config, GGUF_PREFIX, GGUF_NAMES, permuted),
            TensorRule("output_norm.weight", "final_norm"),
            *_head_rules(config, "output.weight"),
        ),
        # rope_freqs.weight is part of the config: it scales the rotary embedding.
        ignored=(r"blk\.\d+\.attn_rot_embd\.weight", r"rope_freqs\.weight"),
        copies=_head_copies(config, "output.weight", "token_embd.weight"),
    )


def _layer_rules(
    config: ModelConfig, prefix: str, names: dict[str, str], permuted: dict[str, Transform]
) -> Iterator[TensorRule]:
    for part, name in names.items():
        path = f"layers.{part}"
        if part.endswith("_norm"):
            yield TensorRule(f"{prefix}{name}.weight", f"{path}.scale")
            continue
        order = permuted.get(part, IDENTITY)
        yield TensorRule(f"{prefix}{name}.weight", f"{path}.kernel", chain(order, TRANSPOSE))
        has_bias = config.attention_bias if part.startswith("attention.") else config.mlp_bias
        if has_bias:
            yield TensorRule(f"{prefix}{name}.bias", f"{path}.bias", order)


def _head_rules(config: ModelConfig, name: str) -> tuple[TensorRule, ...]:
    if config.tie_word_embeddings:
        return ()
    return (TensorRule(name, "lm_head", TRANSPOSE),)


def _head_copies(config: ModelConfig, head: str, embedding: str) -> dict[str, str]:
    """Some files of tied models write the head out; it must then be the embedding."""
    return {head: embedding} if config.tie_word_embeddings else {}
