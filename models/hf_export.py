"""A Hugging Face `config.json` for a ModelConfig: the inverse of `config_from_hf`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from checkpoint.errors import FormatError
from models.config import ModelConfig, RopeScaling
from models.hf_config import config_from_hf
from models.hf_fields import ACTIVATIONS
from models.ops.rope import rope_frequencies

_ARCHITECTURES = {
    "llama": ("llama", "LlamaForCausalLM"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "gemma3": ("gemma3_text", "Gemma3ForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
    "falcon": ("falcon", "FalconForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "qwen3_moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
}
"""`model_type` and `architectures`, by family."""
_KNOWN_LLAMA3 = tuple(RopeScaling("llama3", factor, 1.0, 4.0, 8192) for factor in (8.0, 32.0))
"""Llama 3.1 and 3.2: what the factors of a GGUF file usually come from."""


def config_to_hf(config: ModelConfig, dtype: str) -> dict[str, Any]:
    """The fields of `config.json`.

    Args:
        config: of the model.
        dtype: of the weights, e.g. "float32".

    Raises:
        FormatError: a Hugging Face config cannot express it; the message names the field.
    """
    if config.family not in _ARCHITECTURES:
        raise FormatError(
            f"a config.json cannot be made anew for the family {config.family!r} yet; convert "
            "from a Hugging Face folder, whose own config.json is kept"
        )
    is_mistral = config.family == "llama" and config.sliding_window is not None
    model_type, architecture = _ARCHITECTURES["mistral" if is_mistral else config.family]
    fields: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "torch_dtype": dtype,
    }
    if config.family == "gpt2":
        fields |= _gpt2_fields(config)
    elif config.family == "falcon":
        fields |= _falcon_fields(config)
    else:
        fields |= _llama_like_fields(config, is_mistral=is_mistral)
    _check(config, fields)
    return fields


def _llama_like_fields(config: ModelConfig, *, is_mistral: bool) -> dict[str, Any]:
    """Of the families with RMSNorm."""
    fields: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
    }
    if config.family == "gemma3":
        return fields | _gemma3_fields(config)
    fields |= {"hidden_act": config.hidden_act, "rope_theta": config.rope_theta}
    if config.family == "phi3":
        return fields | _phi3_fields(config)
    fields["rope_scaling"] = _scaling(config)
    if config.family == "llama" and not is_mistral:
        fields |= {"attention_bias": config.attention_bias, "mlp_bias": config.mlp_bias}
    elif is_mistral:
        fields["sliding_window"] = config.sliding_window
        if config.attention_bias or config.mlp_bias:
            raise FormatError(
                "config: a sliding window together with biases has no Hugging Face architecture"
            )
    elif config.family == "mixtral":
        fields |= {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_token,
            "sliding_window": config.sliding_window,
        }
    elif config.family == "qwen3_moe":
        fields |= {
            "num_experts": config.num_experts,
            "num_experts_per_tok": config.num_experts_per_token,
            "moe_intermediate_size": config.intermediate_size,
            "norm_topk_prob": config.normalize_expert_weights,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if config.family in ("qwen3", "qwen3_moe"):
        fields["attention_bias"] = config.attention_bias
    return fields


def _gpt2_fields(config: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": config.hidden_size,
        "n_inner": config.intermediate_size,
        "n_layer": config.num_layers,
        "n_head": config.num_heads,
        "n_positions": config.max_position_embeddings,
        "layer_norm_epsilon": config.rms_norm_eps,
        "activation_function": _activation(config, "gelu_new"),
    }


def _falcon_fields(config: ModelConfig) -> dict[str, Any]:
    is_first = config.num_kv_heads == config.num_layer_norms == 1  # As Falcon 7B.
    return {
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_kv_heads": config.num_kv_heads,
        "max_position_embeddings": config.max_position_embeddings,
        "layer_norm_epsilon": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": _scaling(config),
        "activation": _activation(config, "gelu"),
        "bias": config.attention_bias,
        "alibi": False,
        "parallel_attn": True,
        "multi_query": True,
        "new_decoder_architecture": not is_first,
        "num_ln_in_parallel_attn": None if is_first else config.num_layer_norms,
    }


def _activation(config: ModelConfig, usual: str) -> str:
    """The family's usual name of an activation that has several."""
    return usual if config.hidden_act == ACTIVATIONS[usual] else config.hidden_act


def _phi3_fields(config: ModelConfig) -> dict[str, Any]:
    scaling = config.rope_scaling
    rotary_dim = config.head_dim if config.rotary_dim is None else config.rotary_dim
    fields: dict[str, Any] = {
        "sliding_window": config.sliding_window,
        "attention_bias": config.attention_bias,
        "partial_rotary_factor": rotary_dim / config.head_dim,
        "rope_scaling": None,
    }
    if scaling is not None:
        fields["original_max_position_embeddings"] = scaling.original_max_position_embeddings
        fields["rope_scaling"] = {
            "rope_type": "longrope",
            "short_factor": list(scaling.factors),
            "long_factor": list(scaling.long_factors),
            "factor": scaling.factor,
            "attention_factor": scaling.attention_factor,
        }
    return fields


def _gemma3_fields(config: ModelConfig) -> dict[str, Any]:
    whole: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        whole |= _scaling(config) or {}
    scalar = config.query_pre_attn_scalar or config.head_dim
    if int(scalar) != scalar:
        raise FormatError(f"config: query_pre_attn_scalar {scalar} is not an integer")
    windows = config.layer_windows or (config.sliding_window,) * config.num_layers
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": config.attention_bias,
        "query_pre_attn_scalar": int(scalar),  # transformers refuses 256.0.
        "sliding_window": next((window for window in windows if window is not None), None),
        "layer_types": [
            "full_attention" if window is None else "sliding_attention" for window in windows
        ],
        "rope_parameters": {
            "full_attention": whole,
            "sliding_attention": {"rope_type": "default", "rope_theta": config.rope_local_theta},
        },
    }


def _scaling(config: ModelConfig) -> dict[str, Any] | None:
    scaling = config.rope_scaling
    if scaling is None:
        return None
    if scaling.kind == "factors":
        scaling = _llama3_of_factors(config)
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position_embeddings,
    }


def _llama3_of_factors(config: ModelConfig) -> RopeScaling:
    wanted = rope_frequencies(config)
    for known in _KNOWN_LLAMA3:
        if np.allclose(rope_frequencies(replace(config, rope_scaling=known)), wanted, rtol=1e-6):
            return known
    raise FormatError(
        "config: the rotary factors of this GGUF file are not those of Llama 3.1 or 3.2, and a "
        "Hugging Face config has no field for factors; convert the model's original folder"
    )


def _check(config: ModelConfig, fields: dict[str, Any]) -> None:
    """What is written must mean the same when it is read: better to fail here than there."""
    read = config_from_hf(fields)
    if config.rope_scaling is not None and config.rope_scaling.kind == "factors":
        read = replace(read, rope_scaling=config.rope_scaling)
    if read != config:
        raise FormatError(f"config.json would be read back as {read}, not as {config}")
