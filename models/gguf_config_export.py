"""What a GGUF file says of a model's config: the inverse of `gguf_model`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf.constants import GGUFValueType as Kind

from checkpoint.errors import FormatError
from checkpoint.formats.gguf_writer import GgufValue
from models.config import ModelConfig
from models.gguf_model import (
    GEMMA3_LAYERS_A_WHOLE_ONE,
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    config_from_gguf,
)
from models.ops.rope import rope_frequencies
from models.registry import get_family

ARCHITECTURES = {
    "llama": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "gemma3": "gemma3",
    "phi3": "phi3",
    "gpt2": "gpt2",
    "falcon": "falcon",
}
"""Family to `general.architecture`."""
LAYER_NORM_FAMILIES = ("gpt2", "falcon")
KEPT_IN_F32 = ("ffn_gate_inp", "position_embd")
"""Matrices that llama.cpp wants in F32: routers, and positions that are added to the rows."""


def config_metadata(config: ModelConfig) -> dict[str, GgufValue]:
    """Architecture and all fields of the config.

    Raises:
        FormatError: GGUF cannot say this; the message names the field.
    """
    if config.family not in ARCHITECTURES:
        raise FormatError(
            f"models of the family {config.family!r} cannot be written as GGUF yet, only "
            f"{', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[config.family]
    values = _sizes(config) | _attention(config)
    if config.num_experts:
        values |= _experts(config)
    if config.family == "gemma3":
        values |= _gemma3(config)
    elif config.family == "falcon":
        values["tensor_data_layout"] = text("jploski")
    described = {
        "general.architecture": text(architecture),
        **{f"{architecture}.{key}": value for key, value in values.items()},
    }
    _check(config, described)
    return described


def rope_tensors(config: ModelConfig) -> dict[str, npt.NDArray[np.float32]]:
    """Tensors that are part of the config: what rotary frequencies are divided by, `[R/2]`."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind == "linear":
        return {}
    if scaling.kind == "longrope":
        return {
            LONG_FACTORS: np.array(scaling.long_factors, np.float32),
            SHORT_FACTORS: np.array(scaling.factors, np.float32),
        }
    if scaling.kind == "factors":
        return {ROPE_FACTORS: np.array(scaling.factors, np.float32)}
    plain = rope_frequencies(replace(config, rope_scaling=None))
    return {ROPE_FACTORS: (plain / rope_frequencies(config)).astype(np.float32)}


def text(value: str) -> GgufValue:
    """A text as metadata."""
    return GgufValue(Kind.STRING, value)


def count(value: int) -> GgufValue:
    """A number from 0 as metadata."""
    return GgufValue(Kind.UINT32, value)


def _number(value: float) -> GgufValue:
    return GgufValue(Kind.FLOAT32, value)


def _sizes(config: ModelConfig) -> dict[str, GgufValue]:
    return {
        "vocab_size": count(config.vocab_size),
        "context_length": count(config.max_position_embeddings),
        "embedding_length": count(config.hidden_size),
        "block_count": count(config.num_layers),
        "feed_forward_length": count(config.intermediate_size),
        "attention.head_count": count(config.num_heads),
        "attention.head_count_kv": count(config.num_kv_heads),
        "attention.key_length": count(config.head_dim),
        "attention.value_length": count(config.head_dim),
    }


def _attention(config: ModelConfig) -> dict[str, GgufValue]:
    """Norms, rotation and window."""
    is_layer_norm = config.family in LAYER_NORM_FAMILIES
    eps = "layer_norm_epsilon" if is_layer_norm else "layer_norm_rms_epsilon"
    values = {f"attention.{eps}": _number(config.rms_norm_eps)}
    if config.rotary_dim != 0:
        values["rope.dimension_count"] = count(config.rotary_dim or config.head_dim)
        values["rope.freq_base"] = _number(config.rope_theta)
    if config.sliding_window is not None:
        values["attention.sliding_window"] = count(config.sliding_window)
    scaling = config.rope_scaling
    if scaling is not None and scaling.kind == "linear":
        values["rope.scaling.type"] = text("linear")
        values["rope.scaling.factor"] = _number(scaling.factor)
    if scaling is not None and scaling.kind == "longrope":
        original = scaling.original_max_position_embeddings
        values["rope.scaling.type"] = text("longrope")
        values["rope.scaling.original_context_length"] = count(original)
        values["rope.scaling.attn_factor"] = _number(scaling.attention_factor)
    return values


def _experts(config: ModelConfig) -> dict[str, GgufValue]:
    values = {
        "expert_count": count(config.num_experts),
        "expert_used_count": count(config.num_experts_per_token),
    }
    if config.family == "qwen3_moe":
        values["expert_feed_forward_length"] = count(config.intermediate_size)
    return values


def _gemma3(config: ModelConfig) -> dict[str, GgufValue]:
    """Which layers have a window, and their rotary base."""
    values = {}
    if config.layer_windows:
        (window,) = {window for window in config.layer_windows if window is not None}
        period = config.layer_windows.index(None) + 1
        values["attention.sliding_window"] = count(window)
        if period != GEMMA3_LAYERS_A_WHOLE_ONE:
            values["attention.sliding_window_pattern"] = count(period)
    if config.rope_local_theta is not None:
        values["rope.freq_base_swa"] = _number(config.rope_local_theta)
    return values


def _check(config: ModelConfig, described: Mapping[str, GgufValue]) -> None:
    """The file must be read as this very model: better to fail here than there."""
    metadata = {key: value.value for key, value in described.items()}
    table = get_family(config.family).name_tables["gguf"](config)
    names = [name for rule in table.rules for name, _ in rule.parts((config.num_layers,))]
    tensors: dict[str, Any] = {}
    if config.rope_scaling is not None and config.rope_scaling.kind == "longrope":
        scaling = config.rope_scaling
        tensors = {LONG_FACTORS: scaling.long_factors, SHORT_FACTORS: scaling.factors}
    read = config_from_gguf(metadata, names, tensors)
    read = replace(read, bos_token_id=config.bos_token_id, eos_token_ids=config.eos_token_ids)
    if ARCHITECTURES[config.family] == "llama":  # The factors of its scaling are a tensor.
        read = replace(read, rope_scaling=config.rope_scaling)
    if read == config:
        return
    differing = [
        field.name
        for field in fields(config)
        if getattr(read, field.name) != getattr(config, field.name)
    ]
    raise FormatError(
        f"GGUF cannot say this of a {config.family} model: {differing[0]} "
        f"{getattr(config, differing[0])!r} would be read as {getattr(read, differing[0])!r}"
    )
