"""Make the greedy goldens of SmolLM2: what `transformers` answers on the same weights.

`transformers` loads the GGUF file's weights, decoded to float32; the tool checks that they
equal `gguf.dequantize` bit for bit, with q and k rows put in the half-split rotary order.
Each prompt is then continued greedily for 48 tokens, whatever they are: the end-of-turn
token does not end the output. Along with the tokens it keeps the margin between the best
and the second logit, so that a test can tell a near-tie from a mistake.

Run it in an environment of its own, from the repository's root:

    python3 -m venv goldens-env
    goldens-env/bin/pip install torch==2.13.0 transformers==5.23.0 accelerate gguf jinja2 ml_dtypes
    PYTHONPATH=. goldens-env/bin/python tools/make_smollm2_goldens.py \
        --model SmolLM2-135M-Instruct.Q4_1.gguf --out tests/goldens/smollm2_greedy.json

The CPU build of torch is enough. The token ids of the prompts come from this project's own
tokenizer; what the goldens fix is the way from ids to ids.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from checkpoint.formats.gguf import GgufFile
from models.gguf_tokenizer import tokenizer_from_gguf

NUM_OUTPUT_TOKENS = 48
NEAR_TIE_MARGIN = 1e-3

WARES = ("nails", "paint", "rope", "glass", "tiles", "hinges", "bolts", "lamps", "brushes", "tape")
STOCK = " ".join(
    f"Shelf {shelf} holds {7 * shelf % 50 + 3} boxes of {ware}, ordered on day {3 * shelf + 1}."
    for shelf, ware in enumerate(WARES * 2)
)
STORY = (
    "The lighthouse keeper wrote the weather down every evening. On the first day the wind "
    "came from the north, and the boats stayed in the harbour. On the second day it turned, "
    "the sea grew calm, and three boats left before dawn. "
)
PROMPTS: dict[str, str | list[dict[str, str]]] = {
    "one_word": "Hello",
    "fact": "The capital of France is",
    "story": "Once upon a time, in a village by the sea,",
    "code": "def fibonacci(n: int) -> int:\n    if n < 2:\n        return n\n    ",
    "digits": "12, 24, 36, 48, 60, 72, 84,",
    "json": '{"name": "Ada Lovelace", "born": 1815, "occupation": "',
    "cjk": "人工智能是计算机科学的一个分支。東京は日本の",
    "emoji": "I love pizza 🍕🍕 and ice cream 🍦 because",
    "accents_and_spaces": "Zürich  liegt am\tZürichsee.\n\n   Où est la bibliothèque ?",
    "long_text": STOCK + " The shelf with the most boxes is",
    "chat_fact": [{"role": "user", "content": "What is the capital of Japan?"}],
    "chat_code": [{"role": "user", "content": "Write a Python function that reverses a string."}],
    "chat_system": [
        {"role": "system", "content": "You are a pirate. Answer in one short sentence."},
        {"role": "user", "content": "How is the weather today?"},
    ],
    "chat_turns": [
        {"role": "user", "content": "My name is Tom and I have 3 apples."},
        {"role": "assistant", "content": "Hello Tom! You have 3 apples."},
        {"role": "user", "content": "I eat one. How many are left, and what is my name?"},
    ],
    "chat_long": [{"role": "user", "content": "Summarise this text.\n\n" + STORY * 12}],
}
PROMPTS_WITH_LOGPROBS = ("fact", "chat_turns")


def load_model(path: Path) -> transformers.PreTrainedModel:
    """The GGUF file's model in float32 with eager attention."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


def half_split_rows(rows: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows of neighbouring rotary pairs, per head: all firsts, then all seconds."""
    heads = rows.reshape(num_heads, -1, rows.shape[1])
    return np.concatenate((heads[:, 0::2], heads[:, 1::2]), axis=1).reshape(rows.shape)


def expected_weights(path: Path, num_heads: int, num_kv_heads: int) -> Iterator[Any]:
    """`(name in transformers, float32 array)` of every tensor in the file."""
    parts = {
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads = {"attn_q": num_heads, "attn_k": num_kv_heads}
    for tensor in gguf.GGUFReader(path).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        name = {
            "token_embd.weight": "model.embed_tokens.weight",
            "output_norm.weight": "model.norm.weight",
        }.get(tensor.name)
        if name is None:
            _, layer, part, _ = tensor.name.split(".")
            name = f"model.layers.{layer}.{parts[part]}.weight"
            if part in heads:
                values = half_split_rows(values, heads[part])
        yield name, values


def check_model(model: transformers.PreTrainedModel, path: Path) -> None:
    """Raise unless the model has the file's constants and, bit for bit, its weights."""
    config, metadata = model.config, GgufFile(path).metadata
    pairs = {
        "rope_theta": (config.rope_parameters["rope_theta"], metadata["llama.rope.freq_base"]),
        "rms_norm_eps": (
            config.rms_norm_eps,
            metadata["llama.attention.layer_norm_rms_epsilon"],
        ),
        "rope_type": (config.rope_parameters["rope_type"], "default"),
        "tie_word_embeddings": (config.tie_word_embeddings, True),
    }
    wrong = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    if wrong:
        raise SystemExit(f"transformers read other constants than the file's: {wrong}")
    state = {name: value.numpy() for name, value in model.state_dict().items()}
    expected = dict(expected_weights(path, config.num_attention_heads, config.num_key_value_heads))
    if state.keys() - {"lm_head.weight"} != expected.keys():
        raise SystemExit("transformers' tensors are not the file's")
    for name, values in expected.items():
        if not np.array_equal(state[name], values):
            raise SystemExit(f"transformers' {name} differs from the file's values")
    if not np.array_equal(state["lm_head.weight"], expected["model.embed_tokens.weight"]):
        raise SystemExit("transformers' lm_head is not the embedding")


def continue_greedily(
    model: transformers.PreTrainedModel, prompt_token_ids: list[int]
) -> dict[str, list[Any]]:
    """The next tokens with, for each, its margin, the runner-up and its logprob."""
    record: dict[str, list[Any]] = {
        "output_token_ids": [],
        "runner_up_token_ids": [],
        "margins": [],
        "logprobs": [],
    }
    fed, past = torch.tensor([prompt_token_ids]), None
    for _ in range(NUM_OUTPUT_TOKENS):
        with torch.no_grad():
            out = model(fed, past_key_values=past, use_cache=True)
        past, logits = out.past_key_values, out.logits[0, -1]
        best = torch.topk(logits, 2)
        token_id = int(best.indices[0])
        record["output_token_ids"].append(token_id)
        record["runner_up_token_ids"].append(int(best.indices[1]))
        record["margins"].append(round(float(best.values[0] - best.values[1]), 6))
        record["logprobs"].append(round(float(torch.log_softmax(logits, -1)[token_id]), 6))
        fed = torch.tensor([[token_id]])
    return record


def make_goldens(path: Path) -> dict[str, Any]:
    """Everything that goes into the file."""
    model = load_model(path)
    check_model(model, path)
    tokenizer = tokenizer_from_gguf(GgufFile(path).metadata)
    prompts: list[dict[str, Any]] = []
    source: dict[str, Any]
    for name, prompt in PROMPTS.items():
        if isinstance(prompt, str):
            source, token_ids = {"text": prompt}, tokenizer.encode(prompt)
        else:
            source, token_ids = {"messages": prompt}, tokenizer.encode_chat(prompt)
        record = continue_greedily(model, token_ids)
        if name not in PROMPTS_WITH_LOGPROBS:
            del record["logprobs"]
        prompts.append({"name": name, **source, "prompt_token_ids": token_ids, **record})
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


def write_json(goldens: dict[str, Any], path: Path) -> None:
    """One line a prompt, so that a change shows as a change of that prompt."""
    head = {key: value for key, value in goldens.items() if key != "prompts"}
    lines = ",\n    ".join(json.dumps(prompt, ensure_ascii=False) for prompt in goldens["prompts"])
    text = json.dumps(head, indent=2).removesuffix("\n}")
    path.write_text(f'{text},\n  "prompts": [\n    {lines}\n  ]\n}}\n', encoding="utf-8")


def main() -> None:
    """Check the weights, continue every prompt, write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--out", type=Path, required=True, help="the JSON file to write")
    arguments = parser.parse_args()
    write_json(make_goldens(arguments.model), arguments.out)


if __name__ == "__main__":
    main()
