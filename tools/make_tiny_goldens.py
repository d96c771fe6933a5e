"""Make tiny random models and the logits that `transformers` computes for them.

One Hugging Face folder a config variant, with `logits.npz`: `token_ids int32[T]` and
`logits float32[T, V]`, computed in float32 with eager attention. The tests compare our
logits with these, so that they need neither torch nor transformers. Beside them, in
`tiny_bert`, an encoder.

Run it in an environment of its own, from the repository's root:

    python3 -m venv goldens-env
    goldens-env/bin/pip install torch==2.13.0 transformers==5.23.0 numpy safetensors
    goldens-env/bin/python tools/make_tiny_goldens.py --out tests/goldens/tiny

The CPU build of torch is enough. The same versions give the same files.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB_SIZE = 257
NUM_TOKENS = 32
WEIGHT_STDDEV = 0.12
"""Large enough that attention is far from uniform and the logits differ visibly."""
SHARD_SIZE = "40KB"

SMALL: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3],
    "long_factor": [1.5, 4.0, 7.5],
}
GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "rope_theta": 50000.0, "factor": 4.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts_per_tok": 2, "num_hidden_layers": 2, "hidden_size": 24}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2_mha": ("llama", {"num_key_value_heads": 4}),
    "llama3_rope_scaling": (
        "llama",
        {"hidden_size": 48, "num_attention_heads": 3, "num_key_value_heads": 1}
        | {"rope_parameters": LLAMA3_ROPE},
    ),
    "linear_rope_scaling": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}},
    ),
    "mistral_sliding_window": ("mistral", {"sliding_window": 7}),
    "mistral_full_attention": ("mistral", {"sliding_window": None, "head_dim": 8}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mqa": ("llama", {"num_key_value_heads": 1}),
    "head_dim": ("llama", {"head_dim": 24}),
    "qwen2": ("qwen2", {}),
    "qwen2_mixed_windows": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}
        | {"tie_word_embeddings": True},
    ),
    "qwen3": ("qwen3", {"head_dim": 12}),
    "qwen3_biases": ("qwen3", {"head_dim": 8, "attention_bias": True}),
    "gemma3": (
        "gemma3_text",
        {"hidden_size": 24, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 5}
        | {"query_pre_attn_scalar": 12, "tie_word_embeddings": True, "intermediate_size": 40}
        | {"rope_parameters": GEMMA3_ROPE, "sliding_window_pattern": 3},
    ),
    "phi3": ("phi3", {"sliding_window": 9, "pad_token_id": 0}),
    "phi3_short_rope": (
        "phi3",
        {"rope_parameters": LONG_ROPE | {"partial_rotary_factor": 0.75}}
        | {"original_max_position_embeddings": 64, "pad_token_id": 0},
    ),
    "phi3_long_rope": (
        "phi3",
        {"rope_parameters": LONG_ROPE | {"partial_rotary_factor": 0.75}}
        | {"original_max_position_embeddings": 16, "pad_token_id": 0}
        | {"tie_word_embeddings": True},
    ),
    "gpt2": ("gpt2", GPT2),
    "falcon_7b": ("falcon", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "falcon_180b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True}
        | {"ffn_hidden_size": 48},
    ),
    "falcon_11b": (
        "falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "mixtral": ("mixtral", EXPERTS | {"num_local_experts": 4, "intermediate_size": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        EXPERTS
        | {"num_experts": 6, "moe_intermediate_size": 12, "norm_topk_prob": True, "head_dim": 8},
    ),
    "qwen3_moe_unnormalized": (
        "qwen3_moe",
        EXPERTS
        | {"num_experts": 3, "moe_intermediate_size": 16, "norm_topk_prob": False, "head_dim": 8},
    ),
}
SHARDED = "llama2_mha"


def make_model(variant: str) -> transformers.PreTrainedModel:
    """The variant's model with random weights, norms and biases, the same at each run."""
    model_type, changes = VARIANTS[variant]
    own_names = model_type == "gpt2"
    fields = changes if own_names else SMALL | changes
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    randomise(model, seed=list(VARIANTS).index(variant))
    return model


def randomise(model: transformers.PreTrainedModel, seed: int) -> None:
    """Give every parameter random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * WEIGHT_STDDEV
            is_norm = "norm" in name.lower() or ".ln_" in name
            parameter.copy_(values + 1.0 if is_norm else values)
            # Half the weights' bits are enough for a golden; the logits use the rounded ones.
            parameter.copy_(parameter.bfloat16().float())


def write_variant(variant: str, folder: Path) -> None:
    """Write one folder: config.json, the weights, logits.npz."""
    model = make_model(variant)
    generator = np.random.default_rng(len(variant))
    token_ids = generator.integers(0, VOCAB_SIZE, NUM_TOKENS, dtype=np.int32)
    with torch.no_grad():
        logits = model(torch.from_numpy(token_ids)[None].long()).logits[0].numpy()
    stored = model.bfloat16() if variant != SHARDED else model
    limit = {"max_shard_size": SHARD_SIZE} if variant == SHARDED else {}
    stored.save_pretrained(folder, **limit)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez_compressed(folder / "logits.npz", token_ids=token_ids, logits=logits)


def write_bert(folder: Path) -> None:
    """Write a tiny encoder and `rows.npz`: `token_ids int32[B, T]`, `num_tokens int32[B]`, and
    what `transformers` makes of them: `rows float32[B, T, E]`, of padding zeros."""
    config = transformers.BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=20,
    )
    model = transformers.BertModel(config, add_pooling_layer=True).float().eval()
    model.set_attn_implementation("eager")
    randomise(model, seed=len(VARIANTS))
    num_tokens = np.array([9, 20, 1], np.int32)
    token_ids = np.random.default_rng(0).integers(0, VOCAB_SIZE, (3, 20), dtype=np.int32)
    mask = np.arange(20) < num_tokens[:, None]
    with torch.no_grad():
        out = model(
            torch.from_numpy(token_ids).long(), attention_mask=torch.from_numpy(mask).long()
        )
    rows = out.last_hidden_state.numpy() * mask[..., None]
    model.bfloat16().save_pretrained(folder)
    np.savez_compressed(folder / "rows.npz", token_ids=token_ids, num_tokens=num_tokens, rows=rows)


def main() -> None:
    """Write every variant and say which versions made them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to replace")
    out: Path = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    torch.set_num_threads(1)
    for variant in VARIANTS:
        write_variant(variant, out / variant)
    write_bert(out.parent / "tiny_bert")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (out / "made_with.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
