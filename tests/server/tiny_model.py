"""A tiny random model as a Hugging Face folder, for tests with a real engine."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.engine.tiny_tokenizers import EOS, byte_tokenizer

CONTEXT = 512
VOCAB, HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS = EOS + 1, 32, 56, 2, 4, 2
ENGINE_FLAGS = {
    "max_model_len": CONTEXT,
    "token_budget": 16,
    "buckets": (4, 16),
    "max_num_seqs": 4,
    "kv_cache_bytes": 2 << 20,
}


def write_tiny_model(folder: Path, context: int = CONTEXT) -> Path:
    """Random weights of a Llama and a tokenizer of one token a byte."""
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
        "max_position_embeddings": context,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "vocab_size": VOCAB,
        "eos_token_id": EOS,
    }
    (folder / "config.json").write_text(json.dumps(config))
    byte_tokenizer().backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "chat_template": template})
    )
    return folder


def _weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    kv_size = HIDDEN // HEADS * KV_HEADS
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.self_attn.q_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.self_attn.k_proj.weight": (kv_size, HIDDEN),
            f"{prefix}.self_attn.v_proj.weight": (kv_size, HIDDEN),
            f"{prefix}.self_attn.o_proj.weight": (HIDDEN, HIDDEN),
            f"{prefix}.mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
            f"{prefix}.mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        }
    weights = {name: rng.normal(0, 0.2, shape).astype(np.float32) for name, shape in shapes.items()}
    norms = [f"model.layers.{layer}.{kind}_layernorm.weight" for layer in range(LAYERS)
             for kind in ("input", "post_attention")]  # fmt: skip
    return weights | {name: np.ones(HIDDEN, np.float32) for name in [*norms, "model.norm.weight"]}
