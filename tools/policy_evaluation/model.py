"""A random model whose prefill dominates, as a Hugging Face folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

VOCAB_SIZE = 256
CONTEXT = 1344
HIDDEN, INTERMEDIATE, LAYERS = 512, 2048, 4
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32
"""Attention is narrow, so that linear layers dominate at this context as they
do in a model of several billion parameters."""


def write_model(folder: Path) -> Path:
    """16 million random parameters of a Llama; one token a byte."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(_weights(), folder / "model.safetensors")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB_SIZE,
        "eos_token_id": 0,
    }
    (folder / "config.json").write_text(json.dumps(config))
    _byte_tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text("{}")
    return folder


def _byte_tokenizer() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    query, key = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    shapes = {"model.embed_tokens.weight": (VOCAB_SIZE, HIDDEN)}
    norms = ["model.norm.weight"]
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        norms += [f"{prefix}.{kind}_layernorm.weight" for kind in ("input", "post_attention")]
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (query, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (key, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (key, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, query),
            f"{prefix}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    weights = {
        name: rng.normal(0, 0.05, shape).astype(np.float32) for name, shape in shapes.items()
    }
    return weights | {name: np.ones(HIDDEN, np.float32) for name in norms}
