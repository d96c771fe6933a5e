"""ModelConfig from a GGUF file's metadata."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from checkpoint.errors import FormatError
from models.config import ModelConfig, RopeScaling
from models.gguf_metadata import MetadataReader

ROPE_FACTORS = "rope_freqs.weight"
"""Tensor of Llama 3.1 and later: what its rotary scaling comes to, per pair."""
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
"""Tensors of Phi-3's longrope."""
ROPE_TENSORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that are part of the config."""

GEMMA3_LAYERS_A_WHOLE_ONE = 6
GEMMA3_27B_LAYERS = 62

RopeTensors: TypeAlias = Mapping[str, Sequence[float]]


class _Model:
    """One file's metadata under its architecture's prefix."""

    def __init__(
        self, metadata: Mapping[str, Any], names: Collection[str], rope_tensors: RopeTensors
    ) -> None:
        self.reader = MetadataReader(metadata)
        self.architecture = self.reader.text("general.architecture")
        self.names = frozenset(names)
        self.rope_tensors = rope_tensors

    def key(self, name: str) -> str:
        return f"{self.architecture}.{name}"

    def positive(self, name: str, default: int | None = None) -> int:
        return self.reader.positive(self.key(name), default)

    def integer(self, name: str, default: int) -> int:
        return self.reader.integer(self.key(name), default)

    def number(self, name: str, default: float | None = None) -> float:
        return self.reader.number(self.key(name), default)

    def text(self, name: str, default: str) -> str:
        return self.reader.text(self.key(name), default)

    def is_present(self, name: str) -> bool:
        return self.key(name) in self.reader.metadata


Translate: TypeAlias = Callable[[_Model], ModelConfig]


def config_from_gguf(
    metadata: Mapping[str, Any],
    tensor_names: Collection[str],
    rope_tensors: RopeTensors | None = None,
) -> ModelConfig:
    """ModelConfig of a GGUF file.

    Args:
        metadata: `GgufFile.metadata`.
        tensor_names: `GgufFile.names()`; some features show only there, such as
            a head tied to the embedding (no `output.weight`).
        rope_tensors: values of those of `ROPE_TENSORS` that the file has.

    Raises FormatError for an architecture or a feature that is not supported,
    and for metadata that is missing or of the wrong type.
    """
    model = _Model(metadata, tensor_names, rope_tensors or {})
    if model.architecture not in ARCHITECTURES:
        raise FormatError(
            f"GGUF architecture {model.architecture!r} is not supported, only "
            f"{', '.join(ARCHITECTURES)}"
        )
    return replace(
        ARCHITECTURES[model.architecture](model),
        bos_token_id=model.reader.bos_token_id(),
        eos_token_ids=model.reader.eos_token_ids(),
    )


def _common(model: _Model, *, eps: str = "layer_norm_rms_epsilon") -> dict[str, Any]:
    """What all architectures share."""
    hidden_size = model.positive("embedding_length")
    num_heads = model.positive("attention.head_count")
    num_kv_heads = model.positive("attention.head_count_kv", num_heads)
    if num_heads % num_kv_heads:
        raise FormatError(
            f"GGUF has {num_kv_heads} KV heads, which do not divide {num_heads} heads"
        )
    head_dim = model.positive("attention.key_length", hidden_size // num_heads)
    value_length = "attention.value_length"
    if model.integer(value_length, head_dim) != head_dim:
        raise FormatError(
            f"GGUF {model.key(value_length)} other than the head size {head_dim} is not supported"
        )
    return {
        "vocab_size": _vocab_size(model),
        "hidden_size": hidden_size,
        "intermediate_size": model.positive("feed_forward_length"),
        "num_layers": model.positive("block_count"),
        "num_heads": num_heads,
        "num_kv_heads": num_kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": model.positive("context_length"),
        "rms_norm_eps": model.number(f"attention.{eps}"),
        "tie_word_embeddings": "output.weight" not in model.names,
    }


def _vocab_size(model: _Model) -> int:
    tokens = model.reader.metadata.get("tokenizer.ggml.tokens")
    return model.positive("vocab_size", len(tokens) if isinstance(tokens, list) else None)


def _rope(model: _Model, common: Mapping[str, Any]) -> dict[str, Any]:
    """Base and scaling where whole heads are rotated."""
    head_dim = common["head_dim"]
    dimensions = "rope.dimension_count"
    if model.integer(dimensions, head_dim) != head_dim:
        raise FormatError(
            f"GGUF {model.key(dimensions)} other than the head size {head_dim} is not supported"
        )
    return {
        "rope_theta": model.number("rope.freq_base", 10000.0),
        "rope_scaling": _rope_scaling(model, head_dim),
    }


def _rope_scaling(model: _Model, head_dim: int) -> RopeScaling | None:
    kind = model.text("rope.scaling.type", "none")
    factors = model.rope_tensors.get(ROPE_FACTORS)
    if factors is not None:
        if kind != "none":
            raise FormatError(f"GGUF has both {ROPE_FACTORS} and rope scaling {kind!r}")
        return RopeScaling(
            kind="factors", factor=1.0, factors=_factors(ROPE_FACTORS, factors, head_dim // 2)
        )
    if kind == "none":
        return None
    if kind != "linear":
        raise FormatError(f"GGUF rope scaling {kind!r} is not supported, only none and linear")
    return RopeScaling(kind="linear", factor=model.number("rope.scaling.factor"))


def _factors(name: str, factors: Sequence[float], num_pairs: int) -> tuple[float, ...]:
    if len(factors) != num_pairs or not all(0 < f < math.inf for f in factors):
        raise FormatError(f"GGUF {name} must hold {num_pairs} positive numbers")
    return tuple(map(float, factors))


def _llama(model: _Model) -> ModelConfig:
    common = _common(model)
    experts = _experts(model) if model.integer("expert_count", 0) else {}
    return ModelConfig(
        family="mixtral" if experts else "llama",
        **common,
        **_rope(model, common),
        **experts,
        attention_bias="blk.0.attn_q.bias" in model.names,
        mlp_bias="blk.0.ffn_up.bias" in model.names,
        sliding_window=model.integer("attention.sliding_window", 0) or None,
    )


def _experts(model: _Model) -> dict[str, Any]:
    num_experts = model.positive("expert_count")
    num_chosen = model.positive("expert_used_count")
    if num_chosen > num_experts:
        raise FormatError(f"GGUF uses {num_chosen} of {num_experts} experts")
    return {"num_experts": num_experts, "num_experts_per_token": num_chosen}


def _qwen2(model: _Model) -> ModelConfig:
    common = _common(model)
    return ModelConfig(family="qwen2", **common, **_rope(model, common), attention_bias=True)


def _qwen3(model: _Model) -> ModelConfig:
    common = _common(model)
    return ModelConfig(
        family="qwen3",
        **common,
        **_rope(model, common),
        attention_bias="blk.0.attn_q.bias" in model.names,
    )


def _qwen3_moe(model: _Model) -> ModelConfig:
    common = _common(model)
    common["intermediate_size"] = model.positive("expert_feed_forward_length")
    return ModelConfig(
        family="qwen3_moe",
        **common,
        **_rope(model, common),
        **_experts(model),
        attention_bias="blk.0.attn_q.bias" in model.names,
    )


def _gemma3(model: _Model) -> ModelConfig:
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if model.is_present(name):
            raise FormatError(f"GGUF {model.key(name)} is not supported for gemma3")
    common = _common(model)
    num_layers, head_dim = common["num_layers"], common["head_dim"]
    period = model.positive("attention.sliding_window_pattern", GEMMA3_LAYERS_A_WHOLE_ONE)
    window = model.positive("attention.sliding_window")
    windows = tuple(window if (layer + 1) % period else None for layer in range(num_layers))
    is_mixed = len(set(windows)) > 1
    # The file has no field for the scale; only the 27B model's is not by the head size.
    scalar = head_dim
    if num_layers == GEMMA3_27B_LAYERS:
        scalar = common["hidden_size"] // common["num_heads"]
    return ModelConfig(
        family="gemma3",
        **common,
        **_rope(model, common),
        hidden_act="gelu_tanh",
        rope_local_theta=model.number("rope.freq_base_swa", 10000.0),
        query_pre_attn_scalar=float(scalar),
        sliding_window=None if is_mixed else windows[0],
        layer_windows=windows if is_mixed else (),
    )


def _phi3(model: _Model) -> ModelConfig:
    common = _common(model)
    head_dim = common["head_dim"]
    rotary_dim = model.positive("rope.dimension_count", head_dim)
    if rotary_dim % 2 or rotary_dim > head_dim:
        raise FormatError(
            f"GGUF {model.key('rope.dimension_count')} {rotary_dim} is not an even part of the "
            f"head size {head_dim}"
        )
    return ModelConfig(
        family="phi3",
        **common,
        rope_theta=model.number("rope.freq_base", 10000.0),
        rope_scaling=_phi3_scaling(model, common["max_position_embeddings"], rotary_dim),
        rotary_dim=None if rotary_dim == head_dim else rotary_dim,
        sliding_window=model.integer("attention.sliding_window", 0) or None,
    )


def _phi3_scaling(model: _Model, max_positions: int, rotary_dim: int) -> RopeScaling | None:
    kind = model.text("rope.scaling.type", "none")
    if kind not in ("none", "longrope"):
        raise FormatError(f"GGUF rope scaling {kind!r} is not supported, only none and longrope")
    present = [name for name in (LONG_FACTORS, SHORT_FACTORS) if name in model.rope_tensors]
    if not present:
        return None
    if len(present) == 1:
        raise FormatError(f"GGUF has {present[0]} without its counterpart")
    original = model.positive("rope.scaling.original_context_length")
    long_factors, short_factors = (
        _factors(name, model.rope_tensors[name], rotary_dim // 2) for name in present
    )
    return RopeScaling(
        kind="longrope",
        factor=max_positions / original,
        original_max_position_embeddings=original,
        factors=short_factors,
        long_factors=long_factors,
        attention_factor=model.number("rope.scaling.attn_factor", 1.0),
    )


def _gpt2(model: _Model) -> ModelConfig:
    return ModelConfig(
        family="gpt2",
        **_common(model, eps="layer_norm_epsilon"),
        hidden_act="gelu_tanh",
        attention_bias=True,
        mlp_bias=True,
        rotary_dim=0,
    )


def _falcon(model: _Model) -> ModelConfig:
    common = _common(model, eps="layer_norm_epsilon")
    return ModelConfig(
        family="falcon",
        **common,
        **_rope(model, common),
        hidden_act="gelu",
        attention_bias="blk.0.attn_qkv.bias" in model.names,
        mlp_bias="blk.0.ffn_up.bias" in model.names,
        num_layer_norms=2 if "blk.0.attn_norm_2.weight" in model.names else 1,
    )


ARCHITECTURES: Mapping[str, Translate] = {
    "llama": _llama,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma3": _gemma3,
    "phi3": _phi3,
    "gpt2": _gpt2,
    "falcon": _falcon,
    "qwen3moe": _qwen3_moe,
}
"""`general.architecture` to its translation, token ids left out. "llama" covers Llama, Mistral,
SmolLM2 and Mixtral."""
