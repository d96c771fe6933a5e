"""Exports of a real model in other engines: they must choose the tokens that ours chooses.

A GGUF file (by default the default model) goes to our checkpoint, from there to safetensors, which
`transformers` loads, and to GGUF files in F16 and Q8_0, which llama.cpp loads. Each continues the
prompts of the committed goldens greedily. One forward of ours over prompt and continuation, on the
very same exported weights, then says for each position whether our best token is the other
engine's, and by how much not. Positions where they differ are listed with the margin between the
two tokens' logits: engines round differently, so near-ties may fall either way. llama.cpp also
rounds what a Q8_0 matrix is multiplied with to 8 bits; the same weights written as F32 show what
is left without that.

With `--tiny`, the goldens' tiny random models of all families go to GGUF files in F32 instead, each
with a tokenizer of bytes, and llama.cpp continues random prompts.

    python3 -m venv build/goldens && build/goldens/bin/pip install -r requirements/goldens.in
    .venv/bin/python tools/compare_exports.py --peer-python build/goldens/bin/python
    .venv/bin/python tools/compare_exports.py --peer-python build/goldens/bin/python \\
        --model gemma-3-270m
    .venv/bin/python tools/compare_exports.py --peer-python build/goldens/bin/python --tiny
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import AddedToken, decoders, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from jaxserve import model_store
from jaxserve.engine.config import EngineConfig
from models.loading import open_model
from models.ops.attention.dense import dense_attend
from models.tokenizer import Tokenizer
from models.tokenizer_files import save_tokenizer

GOLDENS = {
    "smollm2-135m-instruct": Path("tests/goldens/smollm2_greedy.json"),
    "gemma-3-270m": Path("tests/goldens/gemma3_greedy.json"),
}
"""Prompts of the models that can be compared."""
TINY = Path("tests/goldens/tiny")
NUM_CONTEXT = 2048
"""Of the engines, see `greedy_peer.py`."""
TINY_PROMPTS, TINY_PROMPT_TOKENS, TINY_TOKENS = 4, 12, 32
F32 = ("--quantization", "F32")
EXPORTS = {
    "hf": "transformers",
    "f16.gguf": "llamacpp",
    "q8_0.gguf": "llamacpp",
    "q8_0_as_f32.gguf": "llamacpp",
}
"""Of a real model, and the engine that loads each."""
SIZES = (64, 128, 896)
"""Padded lengths, so that few programs serve all prompts."""


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


def ask(peer_python: Path, engine: str, export: Path, asked: dict[str, Any]) -> Any:
    """The engine's greedy tokens for each prompt.

    Raises:
        EngineFailed: it could not load or run the export; holds what it printed.
    """
    with tempfile.TemporaryDirectory(prefix="compare-exports-ask-") as scratch:
        prompts, tokens = Path(scratch) / "prompts.json", Path(scratch) / "tokens.json"
        prompts.write_text(json.dumps(asked))
        command = [str(peer_python), "tools/greedy_peer.py", engine, str(export)]
        done = subprocess.run(
            [*command, str(prompts), str(tokens)], capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise EngineFailed(f"{engine} on {export.name}:\n{done.stdout}{done.stderr}")
        return json.loads(tokens.read_text())


class EngineFailed(Exception):
    """The other engine did not run an export."""


def byte_tokenizer() -> Tokenizer:
    """255 bytes, a merge and an end of sequence, as many as the models have: llama.cpp loads no
    file without."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())[:255]
    merge = (characters[0], characters[1])
    vocab = {token: index for index, token in enumerate((*characters, "".join(merge)))}
    backend = Backend(BPE(vocab=vocab, merges=[merge]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<eos>", special=True)])
    return Tokenizer(backend, eos_token_ids=(len(vocab),))


def compare_tiny(peer_python: Path, variants: list[str], folder: Path) -> list[Comparison]:
    """Tiny models as F32 files in llama.cpp."""
    random = np.random.default_rng(0)
    ids = random.integers(256, size=(TINY_PROMPTS, TINY_PROMPT_TOKENS)).tolist()
    prompts = [{"name": str(index), "prompt_token_ids": ids[index]} for index in range(len(ids))]
    asked = {"num_tokens": TINY_TOKENS, "prompts": ids}
    results = []
    for variant in variants:
        # By a name with "phi3" llama.cpp would expect tokens of Phi-3's.
        source = shutil.copytree(TINY / variant, folder / variant / "model")
        save_tokenizer(byte_tokenizer(), source)
        _set_context(source / "config.json")
        export = folder / f"{variant}.gguf"
        try:
            convert(source, export, "--to", "gguf", *F32)
        except subprocess.CalledProcessError:
            print(f"{variant}: jaxserve refuses it, see above", file=sys.stderr)
            continue
        try:
            made = ask(peer_python, "llamacpp", export, asked)
        except EngineFailed as error:
            print(error, file=sys.stderr)
            continue
        results.append(compare("llamacpp", export, prompts, made))
    return results


def _set_context(config: Path) -> None:
    """As long as the engine's, by which both choose the factors of a longrope."""
    fields = json.loads(config.read_text())
    if fields.get("rope_parameters", {}).get("rope_type") == "longrope":
        config.write_text(json.dumps(fields | {"max_position_embeddings": NUM_CONTEXT}))


def compare_model(
    peer_python: Path, name: str, num_prompts: int, exports: list[str], folder: Path
) -> list[Comparison]:
    """A real model's exports, each in its engine."""
    goldens = json.loads(GOLDENS[name].read_text())
    prompts = goldens["prompts"][:num_prompts]
    asked = {
        "num_tokens": goldens["num_output_tokens"],
        "prompts": [prompt["prompt_token_ids"] for prompt in prompts],
    }
    ours = folder / "ours"
    convert(model_store.resolve(name), ours, "--to", "orbax")
    convert(ours, folder / "hf", "--to", "safetensors")
    convert(ours, folder / "f16.gguf", "--to", "gguf", "--quantization", "F16")
    convert(ours, folder / "q8_0.gguf", "--to", "gguf", "--quantization", "Q8_0")
    # The very weights of the Q8_0 file, in a form that llama.cpp does not round inputs for.
    convert(folder / "q8_0.gguf", folder / "q8_0_as_f32.gguf", "--to", "gguf", *F32)
    return [
        compare(engine, folder / export, prompts, ask(peer_python, engine, folder / export, asked))
        for export, engine in EXPORTS.items()
        if export in exports
    ]


def main() -> None:
    """Convert, ask the engines, compare, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=EngineConfig().model, choices=sorted(GOLDENS))
    parser.add_argument("--peer-python", type=Path, required=True, help="of the engines' venv")
    parser.add_argument("--num-prompts", type=int, default=15)
    parser.add_argument("--exports", nargs="+", choices=EXPORTS, default=list(EXPORTS))
    variants = sorted(path.name for path in TINY.iterdir() if path.is_dir())
    parser.add_argument(
        "--tiny", nargs="*", metavar="VARIANT", help="tiny models instead, all or those named"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="compare-exports-") as scratch:
        if args.tiny is None:
            results = compare_model(
                *(args.peer_python, args.model, args.num_prompts, args.exports, Path(scratch))
            )
        else:
            results = compare_tiny(args.peer_python, args.tiny or variants, Path(scratch))
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
