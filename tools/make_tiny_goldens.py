"""Make tiny random models and the logits that `transformers` computes for them.

One Hugging Face folder a config variant, with `logits.npz`: `token_ids int32[T]` and
`logits float32[T, V]`, computed in float32 with eager attention. The tests compare our
logits with these, so that they need neither torch nor transformers.

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
}
SHARDED = "llama2_mha"


def make_model(variant: str) -> transformers.PreTrainedModel:
    """The variant's model with random weights, norms and biases, the same at each run."""
    model_type, changes = VARIANTS[variant]
    config = transformers.AutoConfig.for_model(model_type, **(SMALL | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    generator = torch.Generator().manual_seed(list(VARIANTS).index(variant))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            values = torch.randn(parameter.shape, generator=generator) * WEIGHT_STDDEV
            parameter.copy_(values + 1.0 if "norm" in name else values)
            # Half the weights' bits are enough for a golden; the logits use the rounded ones.
            parameter.copy_(parameter.bfloat16().float())
    return model


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


def main() -> None:
    """Write every variant and say which versions made them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to replace")
    out: Path = parser.parse_args().out
    shutil.rmtree(out, ignore_errors=True)
    torch.set_num_threads(1)
    for variant in VARIANTS:
        write_variant(variant, out / variant)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    (out / "made_with.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
