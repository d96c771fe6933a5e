"""A random Llama of an operating point's shape: as a Hugging Face folder, or on the device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from models.config import ModelConfig
from models.decoder import Params
from models.hf_config import config_from_hf
from models.registry import get_family
from tools.policy_evaluation.operating_point import VOCAB_SIZE, OperatingPoint


def write_model(folder: Path, point: OperatingPoint) -> Path:
    """Config and tokenizer, and the weights if the point wants them in a file."""
    folder.mkdir(parents=True, exist_ok=True)
    if point.is_file:
        save_file(_weights(point), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_hf_config(point)))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def model_config(point: OperatingPoint) -> ModelConfig:
    return config_from_hf(_hf_config(point))


def device_params(config: ModelConfig, dtype: np.dtype[Any]) -> Params:
    """Random weights, made where they are used."""
    family = get_family(config.family)
    init = jax.jit(lambda key: family.init_params(config, key, dtype))
    params: Params = init(jax.random.key(0, impl="rbg"))
    return params


def _hf_config(point: OperatingPoint) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": point.hidden_size,
        "intermediate_size": point.intermediate_size,
        "num_hidden_layers": point.num_layers,
        "num_attention_heads": point.num_heads,
        "num_key_value_heads": point.num_kv_heads,
        "head_dim": point.head_dim,
        "max_position_embeddings": point.context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": 0,
    }


def byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _weights(point: OperatingPoint) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    width, inner = point.hidden_size, point.intermediate_size
    query, key = point.num_heads * point.head_dim, point.num_kv_heads * point.head_dim
    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, width)}
    norms = ["model.norm.weight"]
    for layer in range(point.num_layers):
        prefix = f"model.layers.{layer}"
        norms += [f"{prefix}.{kind}_layernorm.weight" for kind in ("input", "post_attention")]
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (query, width),
            f"{prefix}.self_attn.k_proj.weight": (key, width),
            f"{prefix}.self_attn.v_proj.weight": (key, width),
            f"{prefix}.self_attn.o_proj.weight": (width, query),
            f"{prefix}.mlp.gate_proj.weight": (inner, width),
            f"{prefix}.mlp.up_proj.weight": (inner, width),
            f"{prefix}.mlp.down_proj.weight": (width, inner),
        }
    weights = {
        name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()
    }
    return weights | {name: np.ones(width, np.float32) for name in norms}
