"""A Llama folder of any size with random float32 weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from checkpoint.formats.safetensors_writer import ShardTensor, make_header

HEAD_DIM = 64
BLOCK_BYTES = 16 << 20


def write_synthetic(
    folder: Path, num_bytes: int, largest_bytes: int, *, is_tied: bool = False
) -> int:
    """A Llama folder whose embedding has `largest_bytes`, and its head, too, unless it is tied.

    Returns:
        Bytes of the tensors.
    """
    folder.mkdir()
    hidden = 2048 if num_bytes >= 1 << 30 else 512
    vocab = largest_bytes // (4 * hidden) | 1  # Odd: nothing divides evenly.
    ffn = 2 * hidden
    layer_bytes = 4 * (4 * hidden * hidden + 3 * hidden * ffn + 2 * hidden)
    num_tables = 1 if is_tied else 2
    num_layers = max(1, (num_bytes - num_tables * vocab * hidden * 4) // layer_bytes)
    tensors = list(_tensors(vocab, hidden, ffn, num_layers))[: None if not is_tied else -1]
    fields = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": num_layers,
        "num_attention_heads": hidden // HEAD_DIM,
        "num_key_value_heads": hidden // HEAD_DIM,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": is_tied,
    }
    (folder / "config.json").write_text(json.dumps(fields))
    total = sum(tensor.num_bytes for tensor in tensors)
    block = np.random.default_rng(0).normal(0, 0.02, BLOCK_BYTES // 4).astype(np.float32).tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(make_header(tensors, {"format": "pt"}))
        for start in range(0, total, len(block)):
            file.write(block[: min(len(block), total - start)])
        file.flush()
        os.fsync(file.fileno())
    return total


def _tensors(vocab: int, hidden: int, ffn: int, num_layers: int) -> Iterator[ShardTensor]:
    def tensor(name: str, *shape: int) -> ShardTensor:
        return ShardTensor(f"{name}.weight", "float32", shape, 4 * int(np.prod(shape)))

    yield tensor("model.embed_tokens", vocab, hidden)
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        yield tensor(f"{prefix}input_layernorm", hidden)
        for part in "qkvo":
            yield tensor(f"{prefix}self_attn.{part}_proj", hidden, hidden)
        yield tensor(f"{prefix}post_attention_layernorm", hidden)
        yield tensor(f"{prefix}mlp.gate_proj", ffn, hidden)
        yield tensor(f"{prefix}mlp.up_proj", ffn, hidden)
        yield tensor(f"{prefix}mlp.down_proj", hidden, ffn)
    yield tensor("model.norm", hidden)
    yield tensor("lm_head", vocab, hidden)
