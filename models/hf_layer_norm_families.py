"""`config.json` of the families with LayerNorm, whose field names are not Llama's."""

from __future__ import annotations

from checkpoint.errors import FormatError
from models import hf_fields as read
from models.config import ModelConfig
from models.hf_fields import Fields


def gpt2_config(fields: Fields) -> ModelConfig:
    """A `GPT2LMHeadModel`, token ids left out."""
    read.refuse(
        fields,
        {
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        "gpt2",
    )
    hidden_size = read.positive_int(fields, "n_embd")
    num_heads = read.positive_int(fields, "n_head")
    inner = fields.get("n_inner")
    return ModelConfig(
        family="gpt2",
        vocab_size=read.positive_int(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size
        if inner is None
        else read.positive_int(fields, "n_inner"),
        num_layers=read.num_layers(fields, "n_layer"),
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=read.head_dim(fields, hidden_size, num_heads),
        max_position_embeddings=read.positive_int(fields, "n_positions"),
        rms_norm_eps=read.positive_float(fields, "layer_norm_epsilon", 1e-5),
        tie_word_embeddings=read.boolean(fields, "tie_word_embeddings", True),
        hidden_act=read.activation(fields, "activation_function", "gelu_new"),
        attention_bias=True,
        mlp_bias=True,
        rotary_dim=0,
    )


def falcon_config(fields: Fields) -> ModelConfig:
    """A `FalconForCausalLM`, token ids left out."""
    read.refuse(fields, {"alibi": False}, "falcon")
    is_grouped = read.boolean(fields, "new_decoder_architecture")
    if not is_grouped:
        read.refuse(fields, {"parallel_attn": True}, "falcon")
    hidden_size = read.positive_int(fields, "hidden_size")
    num_heads = read.positive_int(fields, "num_attention_heads")
    if is_grouped:
        kv_heads = read.positive_int(fields, "num_kv_heads", num_heads)
    else:
        kv_heads = 1 if read.boolean(fields, "multi_query", True) else num_heads
    if num_heads % kv_heads:
        raise FormatError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of "
            f"num_kv_heads {kv_heads}"
        )
    theta, scaling = read.rope(fields)
    inner = fields.get("ffn_hidden_size")
    has_bias = read.boolean(fields, "bias")
    return ModelConfig(
        family="falcon",
        vocab_size=read.positive_int(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=(
            4 * hidden_size if inner is None else read.positive_int(fields, "ffn_hidden_size")
        ),
        num_layers=read.num_layers(fields, "num_hidden_layers"),
        num_heads=num_heads,
        num_kv_heads=kv_heads,
        head_dim=read.head_dim(fields, hidden_size, num_heads),
        max_position_embeddings=read.positive_int(fields, "max_position_embeddings", 2048),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=read.positive_float(fields, "layer_norm_epsilon", 1e-5),
        tie_word_embeddings=read.boolean(fields, "tie_word_embeddings", True),
        hidden_act=read.activation(fields, "activation", "gelu"),
        attention_bias=has_bias,
        mlp_bias=has_bias,
        num_layer_norms=_falcon_norms(fields, is_grouped),
    )


def _falcon_norms(fields: Fields, is_grouped: bool) -> int:
    if not is_grouped:
        read.refuse(fields, {"num_ln_in_parallel_attn": 1}, "falcon without groups")
        return 1
    if fields.get("num_ln_in_parallel_attn") is None:
        return 2
    return read.positive_int(fields, "num_ln_in_parallel_attn", at_most=2)
