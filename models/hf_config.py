"""ModelConfig from a Hugging Face `config.json`.

Only what is computed here is accepted. A field that would change the model's output and is
not supported is refused by name: a model that loads is the model that was asked for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from checkpoint.errors import FormatError
from models.config import ModelConfig, RopeScaling

MODEL_TYPES = {"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"}
DEFAULT_RMS_NORM_EPS = 1e-6
DEFAULT_ROPE_THETA = 10000.0
MISTRAL_DEFAULT_SLIDING_WINDOW = 4096
MAX_LAYERS = 4096


def config_from_hf(
    fields: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
) -> ModelConfig:
    """Translate `config.json`.

    Args:
        fields: the parsed `config.json`.
        generation_config: the parsed `generation_config.json`, if there is one. Its
            `eos_token_id` counts before the one of `fields`: chat models end turns with it.

    Raises:
        FormatError: an unsupported architecture or field, or a value that is missing or
            makes no sense; the message names the field.
    """
    model_type = _supported_model_type(fields)
    _refuse_unsupported(fields, model_type)
    hidden_size = _positive_int(fields, "hidden_size")
    num_heads = _positive_int(fields, "num_attention_heads")
    num_kv_heads = _num_kv_heads(fields, model_type, num_heads)
    rope_theta, rope_scaling = _rope(fields)
    eos = (generation_config or {}).get("eos_token_id")
    return ModelConfig(
        family="llama",
        vocab_size=_positive_int(fields, "vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=_positive_int(fields, "intermediate_size"),
        num_layers=_positive_int(fields, "num_hidden_layers", at_most=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=_head_dim(fields, hidden_size, num_heads),
        max_position_embeddings=_positive_int(fields, "max_position_embeddings"),
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        rms_norm_eps=_positive_float(fields, "rms_norm_eps", DEFAULT_RMS_NORM_EPS),
        tie_word_embeddings=_boolean(fields, "tie_word_embeddings"),
        attention_bias=model_type == "llama" and _boolean(fields, "attention_bias"),
        mlp_bias=model_type == "llama" and _boolean(fields, "mlp_bias"),
        sliding_window=_sliding_window(fields, model_type),
        bos_token_id=_bos_token_id(fields.get("bos_token_id")),
        eos_token_ids=_eos_token_ids(fields.get("eos_token_id") if eos is None else eos),
    )


def _supported_model_type(fields: Mapping[str, Any]) -> str:
    architectures = fields.get("architectures")
    known = ", ".join(MODEL_TYPES)
    if not isinstance(architectures, list) or len(architectures) != 1:
        raise FormatError(
            f"config.json: architectures is {architectures!r}; it must name one of {known}"
        )
    model_type = MODEL_TYPES.get(str(architectures[0]))
    if model_type is None:
        raise FormatError(
            f"config.json: architectures names {architectures[0]!r}, which is not supported; "
            f"supported are {known}"
        )
    if fields.get("model_type", model_type) != model_type:
        raise FormatError(
            f"config.json: model_type {fields['model_type']!r} does not go with "
            f"architectures {architectures[0]!r}; it must be {model_type!r}"
        )
    return model_type


def _refuse_unsupported(fields: Mapping[str, Any], model_type: str) -> None:
    if fields.get("auto_map"):
        raise FormatError(
            "config.json: auto_map asks to run Python code from the model's folder, which is "
            "never done; use a version of the model without it"
        )
    if fields.get("quantization_config"):
        raise FormatError(
            "config.json: quantization_config is not supported; use the unquantised folder of "
            "the model, or a GGUF file"
        )
    if fields.get("hidden_act", "silu") not in ("silu", "swish"):
        raise FormatError(
            f"config.json: hidden_act {fields['hidden_act']!r} is not supported, only 'silu'"
        )
    if fields.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise FormatError(
            f"config.json: partial_rotary_factor {fields['partial_rotary_factor']!r} is not "
            "supported, only 1.0"
        )
    layer_types = fields.get("layer_types")
    if layer_types is not None and len(set(map(str, layer_types))) > 1:
        raise FormatError(
            "config.json: layer_types mixes kinds of attention, which is not supported; all "
            "layers must be alike"
        )
    if model_type == "mistral":
        for name in ("attention_bias", "mlp_bias"):
            if fields.get(name):
                raise FormatError(f"config.json: {name} is not supported for mistral")
    for name in ("num_local_experts", "num_experts", "n_routed_experts"):
        if fields.get(name):
            raise FormatError(f"config.json: {name}: mixtures of experts are not supported")


def _rope(fields: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from `rope_parameters` or from `rope_theta` and `rope_scaling`."""
    newer, older = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    if newer and older and newer != older:
        raise FormatError("config.json: rope_parameters and rope_scaling differ; remove one")
    name, scaling = ("rope_parameters", newer) if newer else ("rope_scaling", older)
    if not isinstance(scaling, Mapping):
        raise FormatError(f"config.json: {name} must be an object, not {scaling!r}")
    if any(isinstance(value, Mapping) for value in scaling.values()):
        raise FormatError(
            f"config.json: {name} differs between layers, which is not supported; all layers "
            "must be alike"
        )
    theta_holder = scaling if scaling.get("rope_theta") is not None else fields
    theta = _positive_float(theta_holder, "rope_theta", DEFAULT_ROPE_THETA)
    if scaling.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise FormatError(f"config.json: {name}.partial_rotary_factor is not supported, only 1.0")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, RopeScaling("linear", _positive_float(scaling, "factor"))
    if kind == "llama3":
        return theta, _llama3_scaling(scaling, name)
    raise FormatError(
        f"config.json: {name}.rope_type {kind!r} is not supported; supported are 'default', "
        "'linear' and 'llama3'"
    )


def _llama3_scaling(scaling: Mapping[str, Any], name: str) -> RopeScaling:
    llama3 = RopeScaling(
        kind="llama3",
        factor=_positive_float(scaling, "factor"),
        low_freq_factor=_positive_float(scaling, "low_freq_factor"),
        high_freq_factor=_positive_float(scaling, "high_freq_factor"),
        original_max_position_embeddings=_positive_int(scaling, "original_max_position_embeddings"),
    )
    if llama3.high_freq_factor <= llama3.low_freq_factor:
        raise FormatError(
            f"config.json: {name}.high_freq_factor must be above low_freq_factor, "
            f"got {llama3.high_freq_factor} and {llama3.low_freq_factor}"
        )
    return llama3


def _num_kv_heads(fields: Mapping[str, Any], model_type: str, num_heads: int) -> int:
    # Llama's files may leave the field out, meaning one KV head per query head.
    if model_type == "llama" and fields.get("num_key_value_heads") is None:
        return num_heads
    num_kv_heads = _positive_int(fields, "num_key_value_heads")
    if num_heads % num_kv_heads:
        raise FormatError(
            f"config.json: num_attention_heads {num_heads} is not a multiple of "
            f"num_key_value_heads {num_kv_heads}"
        )
    return num_kv_heads


def _head_dim(fields: Mapping[str, Any], hidden_size: int, num_heads: int) -> int:
    if fields.get("head_dim") is not None:
        head_dim = _positive_int(fields, "head_dim")
    elif hidden_size % num_heads:
        raise FormatError(
            f"config.json: hidden_size {hidden_size} is not a multiple of "
            f"num_attention_heads {num_heads}, and head_dim is not given"
        )
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise FormatError(f"config.json: head_dim {head_dim} is odd; rotary needs pairs")
    return head_dim


def _sliding_window(fields: Mapping[str, Any], model_type: str) -> int | None:
    if model_type == "mistral":
        if fields.get("sliding_window", MISTRAL_DEFAULT_SLIDING_WINDOW) is None:
            return None
        return _positive_int(fields, "sliding_window", MISTRAL_DEFAULT_SLIDING_WINDOW)
    if fields.get("sliding_window") is not None:
        raise FormatError(
            f"config.json: sliding_window {fields['sliding_window']!r} is not defined for llama; "
            "set it to null"
        )
    return None


def _positive_int(
    fields: Mapping[str, Any],
    name: str,
    default: int | None = None,
    at_most: int = 2**31 - 1,
) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
        raise FormatError(
            f"config.json: {name} must be a whole number from 1 to {at_most}, got {value!r}"
        )
    return value


def _positive_float(fields: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = fields.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise FormatError(f"config.json: {name} must be a positive number, got {value!r}")
    return float(value)


def _boolean(fields: Mapping[str, Any], name: str) -> bool:
    value = fields.get(name, False)
    if not isinstance(value, bool):
        raise FormatError(f"config.json: {name} must be true or false, got {value!r}")
    return value


def _bos_token_id(value: Any) -> int | None:
    ids = _eos_token_ids(value)
    return ids[0] if ids else None


def _eos_token_ids(value: Any) -> tuple[int, ...]:
    values = [] if value is None else value if isinstance(value, list) else [value]
    for token_id in values:
        if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
            raise FormatError(
                f"config.json: bos_token_id and eos_token_id must be token ids, got {value!r}"
            )
    return tuple(values)
