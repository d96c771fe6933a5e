"""Exports of a real model in other engines: they must choose the tokens that ours chooses.

A GGUF file (by default the default model) goes to our checkpoint, from there to safetensors, which
`transformers` loads, and to GGUF files in F16 and Q8_0, which llama.cpp loads. Each continues the
prompts of the committed goldens greedily. One forward of ours over prompt and continuation, on the
very same exported weights, then says for each position whether our best token is the other
engine's, and by how much not. Positions where they differ are listed with the margin between the
two tokens' logits: engines round differently, so near-ties may fall either way. llama.cpp also
rounds what a Q8_0 matrix is multiplied with to 8 bits; the same weights written as F32 show what
is left without that.

    python3 -m venv build/goldens && build/goldens/bin/pip install -r requirements/goldens.in
    .venv/bin/python tools/compare_exports.py --peer-python build/goldens/bin/python
    .venv/bin/python tools/compare_exports.py --peer-python build/goldens/bin/python \\
        --model gemma-3-270m
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve import model_store
from jaxserve.engine.config import EngineConfig
from models.loading import open_model
from models.ops.attention.dense import dense_attend

GOLDENS = {
    "smollm2-135m-instruct": Path("tests/goldens/smollm2_greedy.json"),
    "gemma-3-270m": Path("tests/goldens/gemma3_greedy.json"),
}
"""Prompts of the models that can be compared."""
F32 = ("--quantization", "F32")
SIZES = (128, 896)
"""Padded lengths, so that two programs serve all prompts."""


@dataclass(frozen=True)
class Comparison:
    """One export in one engine.

    Attributes:
        engine: its name.
        export: what it loaded.
        num_tokens: compared.
        differing: positions with prompt, index, both tokens, and the margin of our logits.
    """

    engine: str
    export: str
    num_tokens: int
    differing: tuple[dict[str, Any], ...]


def convert(source: Path, target: Path, *options: str) -> None:
    """`jaxserve checkpoint convert`, as a person would run it."""
    command = [".venv/bin/jaxserve", "checkpoint", "convert", str(source), str(target), *options]
    subprocess.run(command, check=True)


def compare(engine: str, export: Path, prompts: list[dict[str, Any]], made: Any) -> Comparison:
    """Our forward over prompt and the engine's continuation, on the exported weights."""
    source = open_model(export)
    family, config = source.family, source.config
    params = source.load_params(jnp.float32)

    @jax.jit
    def forward(params: Any, token_ids: jax.Array) -> jax.Array:
        x = family.embed(params, config, token_ids)
        positions = jnp.arange(token_ids.shape[0], dtype=jnp.int32)
        x, _ = family.run_layers(params, config, x, positions, (), dense_attend(config))
        return family.logits(params, config, x)

    differing: list[dict[str, Any]] = []
    num_tokens = 0
    for prompt, tokens in zip(prompts, made, strict=True):
        ids = [*prompt["prompt_token_ids"], *tokens]
        padded = np.zeros(next(size for size in SIZES if size >= len(ids)), np.int32)
        padded[: len(ids)] = ids
        first = len(prompt["prompt_token_ids"]) - 1
        rows = np.asarray(forward(params, padded))[first : first + len(tokens)]
        num_tokens += len(tokens)
        for index, (row, token) in enumerate(zip(rows, tokens, strict=True)):
            if int(row.argmax()) != token:
                differing.append(
                    {
                        "prompt": prompt["name"],
                        "position": index,
                        "ours": int(row.argmax()),
                        "theirs": token,
                        "margin": round(float(row.max() - row[token]), 5),
                    }
                )
    return Comparison(engine, export.name, num_tokens, tuple(differing))


def main() -> None:
    """Convert, ask the engines, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=EngineConfig().model, choices=sorted(GOLDENS))
    parser.add_argument("--peer-python", type=Path, required=True, help="of the engines' venv")
    parser.add_argument("--num-prompts", type=int, default=15)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    goldens = json.loads(GOLDENS[args.model].read_text())
    prompts = goldens["prompts"][: args.num_prompts]
    asked = {
        "num_tokens": goldens["num_output_tokens"],
        "prompts": [prompt["prompt_token_ids"] for prompt in prompts],
    }
    model = model_store.resolve(args.model)
    with tempfile.TemporaryDirectory(prefix="compare-exports-") as scratch:
        folder = Path(scratch)
        (folder / "prompts.json").write_text(json.dumps(asked))
        convert(model, folder / "ours", "--to", "orbax")
        convert(folder / "ours", folder / "hf", "--to", "safetensors")
        convert(folder / "ours", folder / "f16.gguf", "--to", "gguf", "--quantization", "F16")
        convert(folder / "ours", folder / "q8_0.gguf", "--to", "gguf", "--quantization", "Q8_0")
        # The very weights of the Q8_0 file, in a form that llama.cpp does not round inputs for.
        convert(folder / "q8_0.gguf", folder / "q8_0_as_f32.gguf", "--to", "gguf", *F32)
        results = []
        for engine, name in (
            ("transformers", "hf"),
            ("llamacpp", "f16.gguf"),
            ("llamacpp", "q8_0.gguf"),
            ("llamacpp", "q8_0_as_f32.gguf"),
        ):
            peer = [str(args.peer_python), "tools/greedy_peer.py", engine, str(folder / name)]
            files = [str(folder / "prompts.json"), str(folder / "tokens.json")]
            subprocess.run([*peer, *files], check=True, stdout=subprocess.DEVNULL)
            made = json.loads((folder / "tokens.json").read_text())
            results.append(compare(engine, folder / name, prompts, made))
    if args.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
        return
    for result in results:
        same = result.num_tokens - len(result.differing)
        print(f"{result.engine} on {result.export}: {same} of {result.num_tokens} tokens are ours")
        for entry in result.differing:
            print(f"  {json.dumps(entry)}")


if __name__ == "__main__":
    main()
