"""ModelConfig out of GGUF metadata."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoint.errors import FormatError
from checkpoint.formats.gguf import GgufFile
from models.config import ModelConfig, RopeScaling
from models.gguf_model import config_from_gguf

NAMES = ("token_embd.weight", "output.weight", "blk.0.attn_q.weight")


def metadata(**changes: Any) -> dict[str, Any]:
    """Metadata of a Mistral-like model; `__` in a name stands for a dot."""
    base: dict[str, Any] = {
        "general.architecture": "llama",
        "llama.vocab_size": 1000,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 160,
        "llama.block_count": 3,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.context_length": 4096,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    return base | {key.replace("__", "."): value for key, value in changes.items()}


def test_every_field() -> None:
    full = metadata(
        llama__attention__key_length=16,
        llama__attention__value_length=16,
        llama__rope__dimension_count=16,
        llama__rope__freq_base=1e6,
        llama__rope__scaling__type="linear",
        llama__rope__scaling__factor=4.0,
        llama__attention__sliding_window=512,
        tokenizer__ggml__bos_token_id=1,
        tokenizer__ggml__eos_token_id=2,
        tokenizer__ggml__eot_token_id=7,
    )
    assert config_from_gguf(full, NAMES) == ModelConfig(
        family="llama",
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=160,
        num_layers=3,
        num_heads=8,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        rope_theta=1e6,
        rope_scaling=RopeScaling("linear", 4.0),
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        sliding_window=512,
        bos_token_id=1,
        eos_token_ids=(2, 7),
    )


def test_defaults() -> None:
    bare = metadata(tokenizer__ggml__tokens=["x"] * 77)
    del bare["llama.vocab_size"], bare["llama.attention.head_count_kv"]
    config = config_from_gguf(bare, ["token_embd.weight", "blk.0.attn_q.bias"])
    assert (config.vocab_size, config.num_kv_heads, config.head_dim) == (77, 8, 8)
    assert (config.rope_theta, config.rope_scaling, config.sliding_window) == (10000.0, None, None)
    assert (config.bos_token_id, config.eos_token_ids) == (None, ())
    assert config.tie_word_embeddings
    assert config.attention_bias
    assert not config.mlp_bias


@pytest.mark.parametrize(
    ("changes", "names", "message"),
    [
        ({"general__architecture": "mamba"}, NAMES, "'mamba' is not supported, only llama, qwen2"),
        ({"general__architecture": None}, NAMES, "lacks 'general.architecture'"),
        ({"llama__expert_count": 8}, NAMES, "lacks 'llama.expert_used_count'"),
        ({"llama__expert_count": 2, "llama__expert_used_count": 3}, NAMES, "3 of 2 experts"),
        ({"llama__rope__scaling__type": "yarn"}, NAMES, "'yarn' is not supported"),
        ({"llama__rope__scaling__type": "linear"}, NAMES, "scaling.factor"),
        ({"llama__attention__head_count": 0}, NAMES, "must be positive"),
        ({"llama__attention__head_count_kv": 0}, NAMES, "must be positive"),
        ({"llama__attention__head_count_kv": 3}, NAMES, "do not divide"),
        ({"llama__block_count": 0}, NAMES, "must be positive"),
        ({"llama__block_count": -1}, NAMES, "whole number"),
        ({"llama__block_count": 2.5}, NAMES, "whole number"),
        ({"llama__block_count": None}, NAMES, "lacks 'llama.block_count'"),
        ({"llama__embedding_length": True}, NAMES, "whole number"),
        ({"llama__attention__value_length": 4}, NAMES, "value_length"),
        ({"llama__rope__dimension_count": 4}, NAMES, "dimension_count"),
        ({"llama__rope__freq_base": float("nan")}, NAMES, "positive number"),
        ({"llama__rope__freq_base": float("inf")}, NAMES, "positive number"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, NAMES, "lacks"),
        ({"llama__vocab_size": None}, NAMES, "lacks 'llama.vocab_size'"),
    ],
)
def test_refusals(changes: dict[str, Any], names: tuple[str, ...], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        config_from_gguf(metadata(**changes), names)


def other(architecture: str, **changes: Any) -> dict[str, Any]:
    """Metadata of a small model of another architecture; `__` in a name stands for a dot."""
    base: dict[str, Any] = {
        "vocab_size": 1000,
        "embedding_length": 64,
        "feed_forward_length": 160,
        "block_count": 8,
        "attention.head_count": 8,
        "attention.head_count_kv": 2,
        "context_length": 4096,
        "attention.layer_norm_rms_epsilon": 1e-6,
    }
    fields = base | {key.replace("__", "."): value for key, value in changes.items()}
    named = {f"{architecture}.{key}": value for key, value in fields.items()}
    return {"general.architecture": architecture, **named}


def test_qwen() -> None:
    config = config_from_gguf(other("qwen2", rope__freq_base=1e6), NAMES)
    assert (config.family, config.attention_bias, config.rope_theta) == ("qwen2", True, 1e6)
    config = config_from_gguf(other("qwen3", attention__key_length=16), NAMES)
    assert (config.family, config.attention_bias, config.head_dim) == ("qwen3", False, 16)
    experts = {"expert_count": 6, "expert_used_count": 2, "expert_feed_forward_length": 24}
    config = config_from_gguf(other("qwen3moe", **experts), NAMES)
    assert (config.family, config.num_experts, config.num_experts_per_token) == ("qwen3_moe", 6, 2)
    assert config.intermediate_size == 24
    assert config.normalize_expert_weights


def test_mixtral_is_a_llama_with_experts() -> None:
    config = config_from_gguf(metadata(llama__expert_count=4, llama__expert_used_count=2), NAMES)
    assert (config.family, config.num_experts, config.num_experts_per_token) == ("mixtral", 4, 2)


def test_gemma3() -> None:
    config = config_from_gguf(other("gemma3", attention__sliding_window=16), NAMES[:1])
    assert config.family == "gemma3"
    assert config.layer_windows == (16,) * 5 + (None,) + (16,) * 2
    assert (config.rope_local_theta, config.query_pre_attn_scalar) == (1e4, 8.0)
    assert (config.hidden_act, config.tie_word_embeddings) == ("gelu_tanh", True)
    large = other("gemma3", block_count=62, attention__key_length=16, attention__sliding_window=16)
    assert config_from_gguf(large, NAMES).query_pre_attn_scalar == 8.0, "E / H in 27B"


def test_phi3() -> None:
    fields = other("phi3", rope__dimension_count=6, attention__sliding_window=32)
    config = config_from_gguf(fields, NAMES)
    assert (config.family, config.rotary_dim, config.sliding_window) == ("phi3", 6, 32)
    assert config.rope_scaling is None
    scaling = {"rope__scaling__original_context_length": 1024, "rope__scaling__attn_factor": 1.2}
    tensors = {"rope_factors_short.weight": [1.0] * 3, "rope_factors_long.weight": [2.0] * 3}
    config = config_from_gguf(other("phi3", rope__dimension_count=6, **scaling), NAMES, tensors)
    assert config.rope_scaling == RopeScaling(
        "longrope",
        4.0,
        original_max_position_embeddings=1024,
        factors=(1.0,) * 3,
        long_factors=(2.0,) * 3,
        attention_factor=1.2,
    )


def test_families_with_layer_norm() -> None:
    eps = {"attention__layer_norm_epsilon": 1e-5, "attention__layer_norm_rms_epsilon": None}
    config = config_from_gguf(other("gpt2", attention__head_count_kv=8, **eps), NAMES)
    assert (config.family, config.rotary_dim, config.rms_norm_eps) == ("gpt2", 0, 1e-5)
    config = config_from_gguf(other("falcon", attention__head_count_kv=1, **eps), NAMES)
    assert (config.family, config.num_layer_norms, config.hidden_act) == ("falcon", 1, "gelu")
    names = (*NAMES, "blk.0.attn_norm_2.weight", "blk.0.attn_qkv.bias")
    config = config_from_gguf(other("falcon", **eps), names)
    assert (config.num_layer_norms, config.attention_bias) == (2, True)


@pytest.mark.parametrize(
    ("fields", "tensors", "message"),
    [
        (other("qwen2", rope__scaling__type="yarn"), {}, "'yarn' is not supported"),
        (other("gemma3"), {}, "lacks 'gemma3.attention.sliding_window'"),
        (other("gemma3", final_logit_softcapping=30.0), {}, "final_logit_softcapping"),
        (other("phi3", rope__dimension_count=5), {}, "not an even part"),
        (other("phi3"), {"rope_factors_long.weight": [1.0] * 4}, "without its counterpart"),
        (
            other("phi3", rope__scaling__original_context_length=1024),
            {"rope_factors_long.weight": [1.0] * 3, "rope_factors_short.weight": [1.0] * 4},
            "must hold 4 positive",
        ),
        (other("qwen3moe"), {}, "lacks 'qwen3moe.expert_feed_forward_length'"),
        (other("gpt2"), {}, "lacks 'gpt2.attention.layer_norm_epsilon'"),
    ],
)
def test_refusals_of_other_architectures(
    fields: dict[str, Any], tensors: dict[str, list[float]], message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        config_from_gguf(fields, NAMES, tensors)


@pytest.mark.real_model
def test_smollm2(smollm2_path: Path) -> None:
    file = GgufFile(smollm2_path)
    config = config_from_gguf(file.metadata, file.names())
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (
        30,
        9,
        3,
        64,
    )
    assert (config.hidden_size, config.intermediate_size, config.vocab_size) == (576, 1536, 49152)
    assert config.rope_theta == 100000.0
    assert config.tie_word_embeddings
    assert config.eos_token_ids == (2,)
