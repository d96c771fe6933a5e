"""config.json is translated whole, or refused with the field's name."""

from __future__ import annotations

from typing import Any

import pytest

from checkpoint.errors import FormatError
from models.config import RopeScaling
from models.hf_config import config_from_hf

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-05,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128009],
}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_a_whole_config() -> None:
    config = config_from_hf(LLAMA | {"rope_scaling": LLAMA3_SCALING})
    assert config.family == "llama"
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (
        128256,
        2048,
        8192,
    )
    assert (config.num_layers, config.num_heads, config.num_kv_heads) == (16, 32, 8)
    assert config.head_dim == 64
    assert config.max_position_embeddings == 131072
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling("llama3", 32.0, 1.0, 4.0, 8192)
    assert config.rms_norm_eps == 1e-5
    assert config.tie_word_embeddings
    assert not config.attention_bias
    assert config.sliding_window is None
    assert config.bos_token_id == 128000
    assert config.eos_token_ids == (128001, 128009)


def test_the_newer_rope_parameters_say_the_same_as_the_older_fields() -> None:
    older = config_from_hf(LLAMA | {"rope_scaling": LLAMA3_SCALING})
    newer = dict(LLAMA)
    del newer["rope_theta"]
    newer["rope_parameters"] = LLAMA3_SCALING | {"rope_theta": 500000.0}
    assert config_from_hf(newer) == older


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope_scaling": None}, None),
        ({"rope_scaling": {"rope_type": "default"}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, RopeScaling("linear", 2.0)),
    ],
)
def test_rope_scaling_kinds(changes: dict[str, Any], expected: RopeScaling | None) -> None:
    assert config_from_hf(LLAMA | changes).rope_scaling == expected


def test_fields_that_may_be_left_out() -> None:
    fields = dict(LLAMA)
    for name in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings"):
        del fields[name]
    config = config_from_hf(fields)
    assert config.num_kv_heads == 32
    assert config.rms_norm_eps == 1e-6
    assert config.rope_theta == 10000.0
    assert not config.tie_word_embeddings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({"sliding_window": None}, None), ({"sliding_window": 256}, 256), ({}, 4096)],
)
def test_mistral_sliding_window(changes: dict[str, Any], expected: int | None) -> None:
    assert config_from_hf(MISTRAL | changes).sliding_window == expected


@pytest.mark.parametrize("eos_token_id", [7, [7]])
def test_generation_config_says_which_tokens_end_a_turn(eos_token_id: Any) -> None:
    config = config_from_hf(LLAMA, {"eos_token_id": eos_token_id})
    assert config.eos_token_ids == (7,)
    assert config_from_hf(LLAMA, {"temperature": 1.0}).eos_token_ids == (128001, 128009)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["OPTForCausalLM"]},
            "architectures names 'OPTForCausalLM'.*Qwen3MoeForCausalLM",
        ),
        ({"architectures": None}, "architectures is None"),
        ({"architectures": []}, "architectures is"),
        ({"model_type": "mistral"}, "model_type 'mistral' does not go with"),
        ({"auto_map": {"AutoModelForCausalLM": "evil.Model"}}, "auto_map.*never done"),
        ({"quantization_config": {"bits": 4}}, "quantization_config is not supported"),
        ({"hidden_act": "relu"}, "hidden_act 'relu'.*gelu_new"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_scaling.rope_type 'yarn'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"type": "linear"}}, "factor must be a positive number, got None"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "factor must be a positive"),
        ({"rope_scaling": "linear"}, "rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differs between layers"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": LLAMA3_SCALING},
            "rope_parameters and rope_scaling differ",
        ),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "rope_parameters.partial_rotary"),
        ({"rope_scaling": LLAMA3_SCALING | {"high_freq_factor": 1.0}}, "must be above"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types mixes"),
        ({"num_local_experts": 8}, "num_local_experts: mixtures of experts"),
        ({"sliding_window": 128}, "sliding_window 128 is not defined for llama"),
        ({"vocab_size": None}, "vocab_size must be a whole number"),
        ({"vocab_size": "many"}, "vocab_size must be a whole number"),
        ({"hidden_size": True}, "hidden_size must be a whole number"),
        ({"hidden_size": -64}, "hidden_size must be a whole number"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number from 1 to"),
        ({"num_key_value_heads": 7}, "not a multiple of num_key_value_heads 7"),
        ({"num_attention_heads": 24}, "hidden_size 2048 is not a multiple"),
        ({"head_dim": 63}, "head_dim 63 is odd"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a positive number"),
        ({"rope_theta": float("nan")}, "rope_theta must be a positive number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"eos_token_id": [1.5]}, "eos_token_id must be token ids"),
        ({"bos_token_id": -1}, "bos_token_id and eos_token_id must be token ids"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        config_from_hf(LLAMA | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_bias": True}, "attention_bias is not supported for mistral"),
        ({"num_key_value_heads": None}, "num_key_value_heads must be"),
        ({"sliding_window": 0}, "sliding_window must be a whole number"),
    ],
)
def test_what_mistral_does_not_have_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(FormatError, match=message):
        config_from_hf(MISTRAL | changes)
