"""Each supported architecture's `config.json` as a ModelConfig, token ids left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from checkpoint.errors import FormatError
from models import hf_fields as read
from models.config import ModelConfig, RopeScaling
from models.hf_fields import WHOLE, WINDOWED, Fields
from models.hf_layer_norm_families import falcon_config, gpt2_config

MISTRAL_DEFAULT_SLIDING_WINDOW = 4096
GEMMA3_LAYERS_A_WHOLE_ONE = 6

Translate: TypeAlias = Callable[[Fields], ModelConfig]


def _common(
    fields: Fields,
    *,
    default_eps: float = 1e-6,
    kv_heads_may_be_absent: bool = False,
    default_head_dim: int | None = None,
) -> dict[str, Any]:
    """What the fields of Llama's relatives share."""
    hidden_size = read.positive_int(fields, "hidden_size")
    num_heads = read.positive_int(fields, "num_attention_heads")
    return {
        "vocab_size": read.positive_int(fields, "vocab_size"),
        "hidden_size": hidden_size,
        "intermediate_size": read.positive_int(fields, "intermediate_size"),
        "num_layers": read.num_layers(fields, "num_hidden_layers"),
        "num_heads": num_heads,
        "num_kv_heads": read.num_kv_heads(fields, num_heads, may_be_absent=kv_heads_may_be_absent),
        "head_dim": read.head_dim(fields, hidden_size, num_heads, default_head_dim),
        "max_position_embeddings": read.positive_int(fields, "max_position_embeddings"),
        "rms_norm_eps": read.positive_float(fields, "rms_norm_eps", default_eps),
        "tie_word_embeddings": read.boolean(fields, "tie_word_embeddings"),
        "hidden_act": read.activation(fields, "hidden_act"),
    }


def _refuse_experts(fields: Fields) -> None:
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if fields.get(name):
            raise FormatError(
                f"config.json: {name}: mixtures of experts are not supported for this "
                "architecture, only for MixtralForCausalLM and Qwen3MoeForCausalLM"
            )


def _refuse_mixed_layers(fields: Fields) -> None:
    layer_types = fields.get("layer_types")
    if layer_types is not None and len(set(map(str, layer_types))) > 1:
        raise FormatError(
            "config.json: layer_types mixes kinds of attention, which is not supported for this "
            "architecture; all layers must be alike"
        )


def _llama(fields: Fields) -> ModelConfig:
    _refuse_experts(fields)
    _refuse_mixed_layers(fields)
    if fields.get("sliding_window") is not None:
        raise FormatError(
            f"config.json: sliding_window {fields['sliding_window']!r} is not defined for llama; "
            "set it to null"
        )
    theta, scaling = read.rope(fields)
    return ModelConfig(
        family="llama",
        **_common(fields, kv_heads_may_be_absent=True),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=read.boolean(fields, "attention_bias"),
        mlp_bias=read.boolean(fields, "mlp_bias"),
    )


def _mistral(fields: Fields) -> ModelConfig:
    _refuse_experts(fields)
    _refuse_mixed_layers(fields)
    for name in ("attention_bias", "mlp_bias"):
        if fields.get(name):
            raise FormatError(f"config.json: {name} is not supported for mistral")
    theta, scaling = read.rope(fields)
    window = None
    if fields.get("sliding_window", MISTRAL_DEFAULT_SLIDING_WINDOW) is not None:
        window = read.positive_int(fields, "sliding_window", MISTRAL_DEFAULT_SLIDING_WINDOW)
    return ModelConfig(
        family="llama",
        **_common(fields),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=window,
    )


def _qwen_windows(fields: Fields, num_layers: int) -> dict[str, Any]:
    window = None
    if read.boolean(fields, "use_sliding_window") and fields.get("sliding_window", 0) is not None:
        window = read.positive_int(fields, "sliding_window", 4096)
    first = fields.get("max_window_layers", 28) if window is not None else num_layers
    default_types = [WINDOWED if layer >= first else WHOLE for layer in range(num_layers)]
    return read.windows_as_config(read.layer_windows(fields, num_layers, window, default_types))


def _qwen2(fields: Fields) -> ModelConfig:
    _refuse_experts(fields)
    theta, scaling = read.rope(fields)
    common = _common(fields, kv_heads_may_be_absent=True)
    return ModelConfig(
        family="qwen2",
        **common,
        **_qwen_windows(fields, common["num_layers"]),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=True,
    )


def _qwen3(fields: Fields) -> ModelConfig:
    _refuse_experts(fields)
    theta, scaling = read.rope(fields)
    common = _common(fields, kv_heads_may_be_absent=True, default_head_dim=128)
    return ModelConfig(
        family="qwen3",
        **common,
        **_qwen_windows(fields, common["num_layers"]),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=read.boolean(fields, "attention_bias"),
    )


def _qwen3_moe(fields: Fields) -> ModelConfig:
    read.refuse(
        fields,
        {"decoder_sparse_step": 1, "mlp_only_layers": [], "use_sliding_window": False},
        "qwen3_moe",
    )
    _refuse_mixed_layers(fields)
    theta, scaling = read.rope(fields)
    common = _common(fields)
    common["intermediate_size"] = read.positive_int(fields, "moe_intermediate_size")
    experts = "num_experts" if "num_experts" in fields else "num_local_experts"
    return ModelConfig(
        family="qwen3_moe",
        **common,
        **_experts(fields, experts),
        rope_theta=theta,
        rope_scaling=scaling,
        attention_bias=read.boolean(fields, "attention_bias"),
        normalize_expert_weights=read.boolean(fields, "norm_topk_prob"),
    )


def _mixtral(fields: Fields) -> ModelConfig:
    _refuse_mixed_layers(fields)
    read.refuse(fields, {"attention_bias": False, "mlp_bias": False}, "mixtral")
    theta, scaling = read.rope(fields, default_theta=1e6)
    window = fields.get("sliding_window")
    return ModelConfig(
        family="mixtral",
        **_common(fields, default_eps=1e-5, kv_heads_may_be_absent=True),
        **_experts(fields, "num_local_experts"),
        rope_theta=theta,
        rope_scaling=scaling,
        sliding_window=None if window is None else read.positive_int(fields, "sliding_window"),
    )


def _experts(fields: Fields, name: str) -> dict[str, Any]:
    num_experts = read.positive_int(fields, name)
    return {
        "num_experts": num_experts,
        "num_experts_per_token": read.positive_int(
            fields, "num_experts_per_tok", at_most=num_experts
        ),
    }


def _gemma3(fields: Fields) -> ModelConfig:
    read.refuse(fields, {"use_bidirectional_attention": False}, "gemma3")
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if fields.get(name) is not None:
            raise FormatError(f"config.json: {name} is not supported for gemma3; set it to null")
    _refuse_experts(fields)
    common = _common(fields, default_head_dim=256)
    common["hidden_act"] = read.activation(fields, "hidden_activation", "gelu_pytorch_tanh")
    common["tie_word_embeddings"] = read.boolean(fields, "tie_word_embeddings", True)
    num_layers = common["num_layers"]
    period = read.positive_int(fields, "sliding_window_pattern", GEMMA3_LAYERS_A_WHOLE_ONE)
    default_types = [WINDOWED if (layer + 1) % period else WHOLE for layer in range(num_layers)]
    window = read.positive_int(fields, "sliding_window", 4096)
    theta, scaling, local_theta = _gemma3_rope(fields)
    return ModelConfig(
        family="gemma3",
        **common,
        **read.windows_as_config(read.layer_windows(fields, num_layers, window, default_types)),
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_theta=local_theta,
        attention_bias=read.boolean(fields, "attention_bias"),
        query_pre_attn_scalar=read.positive_float(fields, "query_pre_attn_scalar", 256),
    )


def _gemma3_rope(fields: Fields) -> tuple[float, RopeScaling | None, float]:
    """Base and scaling of whole layers, base of layers with a window."""
    name, parameters = read.rope_parameters(fields)
    if name == "rope_parameters" and any(kind in parameters for kind in (WHOLE, WINDOWED)):
        whole, local = parameters.get(WHOLE) or {}, parameters.get(WINDOWED) or {}
    else:
        whole, local = parameters, {}
    for part in (whole, local):
        read.refuse_partial_rotation(fields, part, name)
    if read.rope_kind(local) != "default":
        raise FormatError(f"config.json: {name}.{WINDOWED}.rope_type must be 'default'")
    theta_holder = whole if "rope_theta" in whole else fields
    local_theta = (
        read.positive_float(local, "rope_theta")
        if "rope_theta" in local
        else read.positive_float(fields, "rope_local_base_freq", 10000.0)
    )
    theta = read.positive_float(theta_holder, "rope_theta", 1e6)
    return theta, read.rope_scaling(whole, name), local_theta


def _phi3(fields: Fields) -> ModelConfig:
    _refuse_experts(fields)
    _refuse_mixed_layers(fields)
    common = _common(fields, default_eps=1e-5, kv_heads_may_be_absent=True)
    name, parameters = read.rope_parameters(fields)
    holder = parameters if parameters.get("partial_rotary_factor") is not None else fields
    share = read.positive_float(holder, "partial_rotary_factor", 1.0)
    rotary_dim = int(common["head_dim"] * share)
    if share > 1 or rotary_dim % 2:
        raise FormatError(
            f"config.json: partial_rotary_factor {share} rotates {rotary_dim} of "
            f"{common['head_dim']} dimensions, which must be an even part of them"
        )
    theta_holder = parameters if parameters.get("rope_theta") is not None else fields
    window = fields.get("sliding_window")
    return ModelConfig(
        family="phi3",
        **common,
        rope_theta=read.positive_float(theta_holder, "rope_theta", 10000.0),
        rope_scaling=_phi3_scaling(fields, parameters, name, common, rotary_dim),
        rotary_dim=None if rotary_dim == common["head_dim"] else rotary_dim,
        attention_bias=read.boolean(fields, "attention_bias"),
        sliding_window=None if window is None else read.positive_int(fields, "sliding_window"),
    )


def _phi3_scaling(
    fields: Fields, parameters: Fields, name: str, common: dict[str, Any], rotary_dim: int
) -> RopeScaling | None:
    kind = read.rope_kind(parameters)
    if kind == "default":
        return None
    if kind not in ("longrope", "su"):  # older files call it su
        raise FormatError(
            f"config.json: {name}.rope_type {kind!r} is not supported for phi3; supported are "
            "'default' and 'longrope'"
        )
    original_name = "original_max_position_embeddings"
    holder = parameters if parameters.get(original_name) is not None else fields
    original = read.positive_int(holder, original_name)
    factor = common["max_position_embeddings"] / original
    if parameters.get("factor") is not None:
        factor = read.positive_float(parameters, "factor")
    default = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    given = {key: value for key, value in parameters.items() if value is not None}
    return RopeScaling(
        kind="longrope",
        factor=factor,
        original_max_position_embeddings=original,
        factors=read.long_rope_factors(parameters, "short_factor", rotary_dim // 2),
        long_factors=read.long_rope_factors(parameters, "long_factor", rotary_dim // 2),
        attention_factor=read.positive_float(given, "attention_factor", default),
    )


ARCHITECTURES: Mapping[str, tuple[str, Translate]] = {
    "LlamaForCausalLM": ("llama", _llama),
    "MistralForCausalLM": ("mistral", _mistral),
    "Qwen2ForCausalLM": ("qwen2", _qwen2),
    "Qwen3ForCausalLM": ("qwen3", _qwen3),
    "Gemma3ForCausalLM": ("gemma3_text", _gemma3),
    "Phi3ForCausalLM": ("phi3", _phi3),
    "GPT2LMHeadModel": ("gpt2", gpt2_config),
    "FalconForCausalLM": ("falcon", falcon_config),
    "MixtralForCausalLM": ("mixtral", _mixtral),
    "Qwen3MoeForCausalLM": ("qwen3_moe", _qwen3_moe),
}
"""Name in `architectures` to the `model_type` that goes with it, and its translation."""
