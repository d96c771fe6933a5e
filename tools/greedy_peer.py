"""Greedy tokens of another engine, for `compare_exports.py`; runs in that engine's environment.

    PYTHON tools/greedy_peer.py transformers FOLDER prompts.json tokens.json
    PYTHON tools/greedy_peer.py llamacpp FILE.gguf prompts.json tokens.json

`prompts.json` holds `{"num_tokens": 48, "prompts": [[ids], ...]}`, `tokens.json` gets the lists.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any


def with_transformers(folder: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """In float32, whatever tokens come: an end of sequence does not end the output."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    settings = json.loads((Path(folder) / "tokenizer_config.json").read_text())
    has_template = "chat_template" in settings or (Path(folder) / "chat_template.jinja").exists()
    chat = [{"role": "user", "content": "Hi"}]
    if has_template and not tokenizer.apply_chat_template(chat, tokenize=False):
        raise SystemExit("the exported tokenizer has lost its chat template")
    outputs = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        cache: Any = None
        produced: list[int] = []
        with torch.no_grad():
            for _ in range(num_tokens):
                result = model(ids, past_key_values=cache, use_cache=True)
                cache = result.past_key_values
                produced.append(int(result.logits[0, -1].argmax()))
                ids = torch.tensor([[produced[-1]]])
        outputs.append(produced)
    return outputs


def with_llama_cpp(file: str, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    """Up to the end of sequence: llama.cpp stops there."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx = 2048
    params.n_parallel = 1
    params.cpuparams.n_threads = 1  # Two wait for each other at every product.
    server = xllamacpp.Server(params)
    outputs = []
    for prompt in prompts:
        body = {
            "prompt": prompt,
            "n_predict": num_tokens,
            "temperature": 0.0,
            "samplers": ["top_k"],
            "top_k": 1,
            "repeat_penalty": 1.0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        request = urllib.request.Request(  # noqa: S310  (our own server)
            f"{server.listening_address}/completion",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:  # noqa: S310
            outputs.append(json.load(answer)["tokens"])
    return outputs


def main() -> None:
    """See the module."""
    engine, model, prompts_file, out = sys.argv[1:]
    asked = json.loads(Path(prompts_file).read_text())
    run = {"transformers": with_transformers, "llamacpp": with_llama_cpp}[engine]
    Path(out).write_text(json.dumps(run(model, asked["prompts"], asked["num_tokens"])))


if __name__ == "__main__":
    main()
