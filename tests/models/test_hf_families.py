"""Published `config.json` files of each family, and what of them is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from checkpoint.errors import FormatError
from models.config import RopeScaling
from models.hf_config import config_from_hf

QWEN2: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "max_window_layers": 21,
    "sliding_window": 32768,
    "use_sliding_window": False,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 151645,
}
QWEN3 = QWEN2 | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "head_dim": 128,
    "attention_bias": False,
}
GEMMA3: dict[str, Any] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 262144,
    "hidden_size": 1152,
    "intermediate_size": 6912,
    "num_hidden_layers": 26,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000,
    "rope_local_base_freq": 10000,
    "rope_scaling": None,
    "sliding_window": 512,
    "sliding_window_pattern": 6,
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
}
PHI3: dict[str, Any] = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 200064,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "original_max_position_embeddings": 4096,
    "partial_rotary_factor": 0.75,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "type": "longrope",
        "short_factor": [1.0] * 48,
        "long_factor": [2.0] * 48,
    },
    "sliding_window": 262144,
    "tie_word_embeddings": True,
}
GPT2: dict[str, Any] = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 50257,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-05,
    "activation_function": "gelu_new",
}
FALCON_7B: dict[str, Any] = {
    "architectures": ["FalconForCausalLM"],
    "model_type": "falcon",
    "vocab_size": 65024,
    "hidden_size": 4544,
    "num_hidden_layers": 32,
    "num_attention_heads": 71,
    "alibi": False,
    "bias": False,
    "multi_query": True,
    "new_decoder_architecture": False,
    "parallel_attn": True,
}
FALCON_180B = FALCON_7B | {
    "hidden_size": 14848,
    "num_hidden_layers": 80,
    "num_attention_heads": 232,
    "num_kv_heads": 8,
    "new_decoder_architecture": True,
}
MIXTRAL: dict[str, Any] = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 32768,
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "sliding_window": None,
    "rope_theta": 1000000.0,
}
QWEN3_MOE = QWEN3 | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def test_qwen2() -> None:
    config = config_from_hf(QWEN2)
    assert (config.family, config.head_dim, config.rope_theta) == ("qwen2", 64, 1e6)
    assert config.attention_bias
    assert not config.mlp_bias
    assert (config.sliding_window, config.layer_windows) == (None, ())
    mixed = config_from_hf(QWEN2 | {"use_sliding_window": True, "sliding_window": 100})
    assert mixed.layer_windows == (None,) * 21 + (100,) * 3
    alike = config_from_hf(QWEN2 | {"use_sliding_window": True, "max_window_layers": 0})
    assert (alike.sliding_window, alike.layer_windows) == (32768, ())


def test_qwen3() -> None:
    config = config_from_hf(QWEN3)
    assert (config.family, config.head_dim, config.attention_bias) == ("qwen3", 128, False)
    assert config_from_hf(QWEN3 | {"attention_bias": True}).attention_bias


def test_gemma3() -> None:
    config = config_from_hf(GEMMA3)
    assert config.family == "gemma3"
    assert config.layer_windows[:7] == (512, 512, 512, 512, 512, None, 512)
    assert (config.rope_theta, config.rope_local_theta) == (1e6, 1e4)
    assert (config.hidden_act, config.query_pre_attn_scalar) == ("gelu_tanh", 256.0)
    assert config.tie_word_embeddings
    scaled = config_from_hf(GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}})
    assert scaled.rope_scaling == RopeScaling("linear", 8.0)
    newer = {key: value for key, value in GEMMA3.items() if not key.startswith("rope")}
    newer["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    assert config_from_hf(newer) == scaled


def test_phi3() -> None:
    config = config_from_hf(PHI3)
    assert (config.family, config.head_dim, config.rotary_dim) == ("phi3", 128, 96)
    scaling = config.rope_scaling
    assert scaling is not None
    assert (scaling.kind, scaling.factor) == ("longrope", 32.0)
    assert scaling.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert (scaling.factors, scaling.long_factors) == ((1.0,) * 48, (2.0,) * 48)
    plain = config_from_hf(PHI3 | {"rope_scaling": None, "partial_rotary_factor": 1.0})
    assert (plain.rope_scaling, plain.rotary_dim) == (None, None)


def test_longrope_follows_the_longest_context_that_is_served() -> None:
    config = config_from_hf(PHI3)
    assert config.for_context(4097) == config
    short = config.for_context(4096)
    assert short.rope_scaling is not None
    assert short.rope_scaling.long_factors == (1.0,) * 48
    assert short.max_position_embeddings == config.max_position_embeddings
    other = config_from_hf(QWEN2)
    assert other.for_context(16) is other


def test_gpt2() -> None:
    config = config_from_hf(GPT2)
    assert (config.family, config.head_dim, config.intermediate_size) == ("gpt2", 64, 3072)
    assert (config.rotary_dim, config.hidden_act) == (0, "gelu_tanh")
    assert config.tie_word_embeddings
    assert config_from_hf(GPT2 | {"n_inner": 100}).intermediate_size == 100


def test_falcon() -> None:
    small = config_from_hf(FALCON_7B)
    assert (small.num_kv_heads, small.head_dim, small.num_layer_norms) == (1, 64, 1)
    assert (small.intermediate_size, small.hidden_act) == (4 * 4544, "gelu")
    large = config_from_hf(FALCON_180B)
    assert (large.num_kv_heads, large.head_dim, large.num_layer_norms) == (8, 64, 2)
    one_norm = config_from_hf(FALCON_180B | {"num_ln_in_parallel_attn": 1})
    assert one_norm.num_layer_norms == 1
    assert config_from_hf(FALCON_7B | {"multi_query": False}).num_kv_heads == 71


def test_mixtures_of_experts() -> None:
    mixtral = config_from_hf(MIXTRAL)
    assert (mixtral.num_experts, mixtral.num_experts_per_token) == (8, 2)
    assert mixtral.normalize_expert_weights
    qwen = config_from_hf(QWEN3_MOE)
    assert (qwen.num_experts, qwen.num_experts_per_token, qwen.intermediate_size) == (128, 8, 768)
    assert qwen.normalize_expert_weights
    assert not config_from_hf(QWEN3_MOE | {"norm_topk_prob": False}).normalize_expert_weights


@pytest.mark.parametrize(
    ("fields", "changes", "message"),
    [
        (QWEN2, {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        (QWEN2, {"layer_types": ["full_attention"]}, "kind of 24 layers"),
        (QWEN2, {"layer_types": ["linear_attention"] * 24}, "names 'linear_attention'"),
        (QWEN2, {"layer_types": ["sliding_attention"] * 24}, "but sliding_window is null"),
        (QWEN2, {"num_experts": 8}, "num_experts: mixtures of experts"),
        (QWEN3, {"head_dim": 63}, "head_dim 63 is odd"),
        (GEMMA3, {"final_logit_softcapping": 30.0}, "final_logit_softcapping is not supported"),
        (GEMMA3, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is not supported"),
        (GEMMA3, {"use_bidirectional_attention": True}, "use_bidirectional_attention True"),
        (GEMMA3, {"architectures": ["Gemma3ForConditionalGeneration"]}, "is not supported"),
        (GEMMA3, {"model_type": "gemma3"}, "must be 'gemma3_text'"),
        (GEMMA3, {"hidden_activation": "relu"}, "hidden_activation 'relu'"),
        (PHI3, {"rope_scaling": {"type": "yarn"}}, "rope_type 'yarn'.*'longrope'"),
        (PHI3, {"rope_scaling": PHI3["rope_scaling"] | {"short_factor": [1.0]}}, "48 positive"),
        (PHI3, {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
        (PHI3, {"original_max_position_embeddings": None}, "original_max_position_embeddings"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention True"),
        (GPT2, {"n_head": 7}, "not a multiple"),
        (FALCON_7B, {"alibi": True}, "alibi True"),
        (FALCON_7B, {"parallel_attn": False}, "parallel_attn False"),
        (FALCON_180B, {"num_kv_heads": 7}, "not a multiple of num_kv_heads 7"),
        (FALCON_180B, {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "from 1 to 8"),
        (QWEN3_MOE, {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        (QWEN3_MOE, {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
        (QWEN3_MOE, {"num_experts": 0}, "num_experts must be"),
        ({"architectures": ["BertModel"]}, {}, "an encoder: it makes embeddings"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    fields: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        config_from_hf(fields | changes)
