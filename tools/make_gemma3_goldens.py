"""Make the greedy goldens of Gemma 3 270M: what `transformers` answers on the same weights.

The GGUF file's tensors are decoded by the `gguf` package and put into a `transformers` model
whose constants are those that Google published for gemma-3-270m, so that nothing of this
project takes part but the prompts' token ids. Each prompt is continued greedily.

Run it in an environment of its own, see make_smollm2_goldens:

    PYTHONPATH=. goldens-env/bin/python tools/make_gemma3_goldens.py \
        --model gemma-3-270m-q4_k_m.gguf --out tests/goldens/gemma3_greedy.json
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from checkpoint.formats.gguf import GgufFile
from models.gguf_tokenizer import tokenizer_from_gguf
from tools.make_smollm2_goldens import (
    NEAR_TIE_MARGIN,
    NUM_OUTPUT_TOKENS,
    STOCK,
    STORY,
    continue_greedily,
    write_json,
)

PROMPTS = {
    "one_word": "Hello",
    "fact": "The capital of France is",
    "story": "Once upon a time, in a village by the sea,",
    "code": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    ",
    "digits": "12, 24, 36, 48, 60, 72, 84,",
    "cjk": "人工智能是计算机科学的一个分支。東京は日本の",
    "accents_and_spaces": "Zürich  liegt am\tZürichsee.\n\n   Où est la bibliothèque ?",
    "past_the_window": STORY * 8 + STOCK + " The shelf with the most boxes is",
}
"""The last one is longer than the sliding window of 512 tokens."""
NORMS = {
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
PROJECTIONS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
PUBLISHED: dict[str, Any] = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 18,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}


def load_model(path: Path) -> transformers.PreTrainedModel:
    """The model with the file's weights; every parameter is set exactly once."""
    config = transformers.Gemma3TextConfig(**PUBLISHED)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "token_embd.weight":
            name = "model.embed_tokens.weight"
        elif tensor.name == "output_norm.weight":
            name, values = "model.norm.weight", values - np.float32(1)
        else:
            _, layer, part, _ = tensor.name.split(".")
            if part in NORMS:  # the file holds what the normalised rows are multiplied by
                values = values - np.float32(1)
            name = f"model.layers.{layer}.{(NORMS | PROJECTIONS)[part]}.weight"
        state[name] = torch.from_numpy(np.array(values, np.float32))
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"the file does not fit: {missing} missing, {unexpected} unexpected")
    model.tie_weights()
    return model


def make_goldens(path: Path) -> dict[str, Any]:
    """Everything that goes into the file."""
    model = load_model(path)
    tokenizer = tokenizer_from_gguf(GgufFile(path).metadata)
    prompts = []
    for name, text in PROMPTS.items():
        token_ids = tokenizer.encode(text)
        record = continue_greedily(model, token_ids)
        prompts.append({"name": name, "text": text, "prompt_token_ids": token_ids, **record})
        print(f"{name}: {len(token_ids)} prompt tokens, {min(record['margins'])} least margin")
    near_ties = [
        {"prompt": prompt["name"], "index": index, "margin": margin}
        for prompt in prompts
        for index, margin in enumerate(prompt["margins"])
        if margin < NEAR_TIE_MARGIN
    ]
    return {
        "model_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "made_with": {"torch": torch.__version__, "transformers": transformers.__version__},
        "dtype": "float32",
        "ends_at_eos": False,
        "num_output_tokens": NUM_OUTPUT_TOKENS,
        "near_tie_margin": NEAR_TIE_MARGIN,
        "near_ties": near_ties,
        "prompts": prompts,
    }


def main() -> None:
    """Continue every prompt, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    write_json(make_goldens(arguments.model), arguments.out)


if __name__ == "__main__":
    main()
