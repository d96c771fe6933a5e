"""Quality beside speed: perplexity on a text, and greedy answers beside those of a reference."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tools.peers.engine import EngineServer
from tools.peers.records import Record

NUM_PERPLEXITY_TOKENS = 4096
WINDOW = 512
NUM_PROMPTS = 16
PROMPT_TOKENS = 32
ANSWER_TOKENS = 32


def read_text(path: Path) -> str:
    """Of JSON lines with a field `text`, joined as `jaxserve bench quality` joins them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return "\n\n".join(json.loads(line)["text"] for line in lines if line)


def perplexity_of_ours(model: Path, options: Sequence[str], text: Path) -> float:
    """By `jaxserve bench quality` in a process of its own."""
    command = [sys.executable, "-m", "jaxserve", "bench", "quality", "--json", "--text", str(text)]
    command += ["--model", str(model), "--num-tokens", str(NUM_PERPLEXITY_TOKENS)]
    done = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True)
    # The last row is of the options; one before it is of the weights as they are.
    return float(json.loads(done.stdout)["rows"][-1]["perplexity"])


def perplexity_by_prompt_logprobs(server: EngineServer, token_ids: Sequence[int]) -> float:
    """The same windows as `jaxserve bench quality`, by vLLM's `prompt_logprobs`."""
    logprobs: list[float] = []
    for start in range(0, NUM_PERPLEXITY_TOKENS, WINDOW):
        ids = list(token_ids[start : min(start + WINDOW, NUM_PERPLEXITY_TOKENS)])
        body = {"prompt": ids, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
        choice = _post(server, body)["choices"][0]
        # The first token of a window is given; each other has its own logprob by its id.
        for token_id, entry in zip(ids[1:], choice["prompt_logprobs"][1:], strict=True):
            logprobs.append(entry[str(token_id)]["logprob"])
    return math.exp(-math.fsum(logprobs) / len(logprobs))


def answers(server: EngineServer, token_ids: Sequence[int]) -> list[str]:
    """Greedy answers to pieces of a text."""
    texts = []
    for index in range(NUM_PROMPTS):
        start = index * PROMPT_TOKENS
        body = {
            "prompt": list(token_ids[start : start + PROMPT_TOKENS]),
            "max_tokens": ANSWER_TOKENS,
            "temperature": 0.0,
            "ignore_eos": True,
        }
        texts.append(_post(server, body)["choices"][0]["text"])
    return texts


def agreement_record(engine: str, texts: Sequence[str], reference: Sequence[str]) -> Record:
    """How many answers are the same, and how far they are on average."""
    shares = [
        num_common_letters(ours, theirs) / max(1, len(theirs))
        for ours, theirs in zip(texts, reference, strict=True)
    ]
    return {
        "kind": "agreement",
        "engine": engine,
        "num_prompts": len(texts),
        "num_equal": sum(a == b for a, b in zip(texts, reference, strict=True)),
        "mean_prefix": sum(shares) / len(shares),
        "texts": list(texts),
    }


def num_common_letters(ours: str, theirs: str) -> int:
    """Length of what both begin with."""
    pairs = enumerate(zip(ours, theirs, strict=False))
    return next((index for index, (a, b) in pairs if a != b), min(len(ours), len(theirs)))


def _post(server: EngineServer, body: dict[str, object]) -> Any:
    request = urllib.request.Request(
        f"http://127.0.0.1:{server.port}/v1/completions",
        json.dumps(body | dict(server.engine.fields)).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:  # noqa: S310
        return json.load(answer)
